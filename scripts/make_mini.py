"""
Make ``scbert-mini``: corpus, gene panel, pretraining, model folder and card.

    python scripts/make_mini.py DATA --work DIR --output model_cards/scbert-mini
    python scripts/make_mini.py DATA --work DIR --leave-out FILE.h5ad   # DIR/pretrained alone, without that file
    python scripts/study_effects.py DATA                                # what studies differ in, beside it

DATA holds the files that scbert-mini/sources.csv names, and ``tables/scbert_gene_order_16906.txt.gz``. What stands in
DIR already is not made again; pretraining that was interrupted goes on.
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from corpus_panel import corpus_panel
from pretraining_curves import plot_pretraining
from scbert.data.corpus_manifest import read_manifest
from scbert.model_cards.card import build_card, public_metrics
from scbert.tokenization import ScBertTokenizer
from scbert.trained_model.model_folder import load_tokenizer, save_model
from scbert.training.initial_model import load_masked_model

CHECKED = (
    "batch_effects.safetensors",
    "config.json",
    "gene_levels.txt",
    "gene_panel.txt",
    "model.safetensors",
    "tokenizer_config.json",
)
ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
SOURCES = CARDS / "scbert-mini" / "sources.csv"
PANEL = Path("tables") / "scbert_gene_order_16906.txt.gz"
PANEL_RULE = {"min_cells": 10, "min_files": 4}
PROBLEM = "its values are neither whole counts nor log1p"


def run(*arguments: Any) -> None:
    """The command ``scbert``, in a process of its own."""
    line = [sys.executable, "-m", "scbert", *map(str, arguments)]
    print(" ".join(line[2:]), file=sys.stderr)
    subprocess.run(line, check=True)


def read_sources() -> list[dict[str, str]]:
    """Rows of sources.csv."""
    with SOURCES.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_corpus_manifest(data: Path, path: Path, left_out: Sequence[str] = ()) -> Path:
    """The table that `scbert build` reads: the files of the corpus, by their place on this machine."""
    rows = [
        [data.resolve() / row["file"], row["file"].partition(".")[0]]
        for row in read_sources()
        if row["use"] == "corpus" and row["file"] not in left_out
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "file_name"], *rows])
    return path


def make(data: Path, work: Path, left_out: Sequence[str] = ()) -> Path:
    """Corpus, panel and the pretrained model in the work folder, each if it is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    corpus, panel, model = (work / name for name in ("corpus", "panel.txt", "pretrained"))
    if not corpus.exists():
        table = write_corpus_manifest(data, work / "sources.csv", left_out)
        run("build", table, "--output", corpus, "--column", "dataset", "--overwrite")
    if not panel.exists():
        corpus_panel(corpus, panel, within=data / PANEL, **PANEL_RULE)
    if not model.exists():
        partial = model.with_name("pretrained.partial")
        more = ["--resume"] if partial.exists() else []
        run("pretrain", corpus, "--genes", panel, "--recipe", "mini", "--output", model, *more)
    return model


def corpus_report(corpus: Path) -> dict[str, Any]:
    """What became of every file, with its origin and licence, and how the panel was chosen."""
    manifest, origins = read_manifest(corpus), {row["file"]: row for row in read_sources()}
    files = []
    for source in manifest["sources"]:
        name = Path(source["path"]).name
        known = {key: origins[name][key] for key in ("origin", "repository_licence")}
        counts = {key: source.get(key) for key in ("cells", "few_genes", "duplicates", "kept")}
        files.append({"file": name, **counts, "problem": PROBLEM if source["problem"] else None, **known})
    others = [row for row in origins.values() if row["use"] != "corpus"]
    return {"cells": manifest["cells"], "files": files, "not_in_the_corpus": others, "panel_rule": PANEL_RULE}


def corpus_section(report: dict[str, Any], genes: int) -> str:
    """The corpus as a part of the card."""
    lines = [
        "## Corpus",
        "",
        f"`scbert build` took {report['cells']:,} cells, those with 200 genes or more, each once. No label was used.",
        "",
        "| file | cells | too few genes | duplicates | kept | origin | licence of the repository it stood in |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in report["files"]:
        numbers = [
            "" if row[key] is None else f"{row[key]:,}"
            for key in ("cells", "few_genes", "duplicates", "kept")
        ]
        origin = (
            row["origin"]
            if not row["problem"]
            else f"{row['origin']}; left out by the builder: {row['problem']}"
        )
        lines.append(f"| {row['file']} | {' | '.join(numbers)} | {origin} | {row['repository_licence']} |")
    held = [f"{row['file']} ({row['reason']})" for row in report["not_in_the_corpus"]]
    rule = report["panel_rule"]
    return "\n".join([
        *lines,
        "",
        f"Not in the corpus: {', '.join(held)}. No evaluation on them is transductive, and none of their cells "
        "stands in a file of the corpus with the same counts of the genes they share. The frozen PBMC of donor A are "
        "of the same study as the sorted cells, but other cells.",
        "",
        f"Panel: the {genes:,} genes that at least {rule['min_cells']} cells of each of at least {rule['min_files']} "
        "files express, among the 16,906 of the original panel and in their order "
        "(`python scripts/corpus_panel.py`).",
        "",
    ])  # fmt: skip


def curve_section(metrics: dict[str, Any]) -> str:
    """How long it was trained, and the picture, as a part of the card."""
    training, settings = metrics["training"], metrics["settings"]
    axes = metrics["data"]["cell_axes"]
    return "\n".join([
        "## Pretraining",
        "",
        f"Recipe `mini`. The gene table holds {axes['axes']} axes of cells, of {axes['genes']:,} genes, found without "
        "labels: those in which the cells of a file differ from each other and not from their neighbours "
        "(`training/cell_axes.py`). They are kept as they were found; what else there is learnt in "
        f"{training['epochs']:.0f} pass over {metrics['cells']['train']:,} cells ({training['steps']:,} steps, "
        f"{metrics['seconds'] / 60:.0f} minutes on one thread of a busy CPU): to tell the expression of the whole cell "
        f"from its vector (cross-entropy {metrics['cell_loss']:.3f}; that of the corpus's mean cell "
        f"{metrics['baseline_cell_loss']:.3f}), and {settings['mlm_probability']:.0%} of a cell's expressed genes that "
        f"are hidden. There are no layers, so nothing of a hidden gene is known but which one it is: "
        f"{metrics['masked_accuracy']:.1%} are guessed right, and always saying each gene's commonest bin gets "
        f"{metrics['baseline_masked_accuracy']:.1%}. Do not use it to fill in genes.",
        "",
        "![Loss of the whole cell and masked accuracy by step](learning_curve.png)",
        "",
    ])  # fmt: skip


def save_small(model: PreTrainedModel, tokenizer: ScBertTokenizer, output: Path) -> None:
    """Weights rounded to bfloat16, tokenizer, and their checksums; no code, which ships once, as the package."""
    save_model(model.bfloat16(), tokenizer, output)
    for code in output.glob("*.py"):
        code.unlink()
    write_checksums(output)


def write_checksums(output: Path) -> None:
    """Of the files of a released folder that a model is made of."""
    checked = [name for name in CHECKED if (output / name).exists()]
    sums = [f"{hashlib.sha256((output / name).read_bytes()).hexdigest()}  {name}" for name in checked]
    (output / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def release(work: Path, output: Path) -> None:
    """The model folder as it ships: weights, tokenizer, figures, card."""
    model, tokenizer = load_masked_model(work / "pretrained"), load_tokenizer(work / "pretrained")
    save_small(model, tokenizer, output)
    metrics = public_metrics(json.loads((work / "pretrained" / "metrics.json").read_text()))
    report = corpus_report(work / "corpus")
    for name, content in (("metrics", metrics), ("corpus", report)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    plot_pretraining(metrics, output / "learning_curve.png")
    (output / "card_1_corpus.md").write_text(corpus_section(report, len(tokenizer.gene_panel)))
    (output / "card_2_curve.md").write_text(curve_section(metrics))
    write_card(output)


def write_card(output: Path) -> None:
    """README.md of a released folder, from what stands in it."""
    build_card(output, output.name).save(output / "README.md")


def main() -> None:
    """Make what is missing, and the folder."""
    parser = argparse.ArgumentParser(prog="make_mini", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=CARDS / "scbert-mini")
    parser.add_argument(
        "--leave-out", action="append", default=[], help="File to leave out; nothing is released."
    )
    options = parser.parse_args()
    make(options.data, options.work, options.leave_out)
    if not options.leave_out:
        release(options.work, options.output)


if __name__ == "__main__":
    main()
