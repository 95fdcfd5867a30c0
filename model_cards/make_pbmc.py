"""
Make ``scbert-mini-pbmc``, the annotator that ships: two cohorts of labelled PBMC, cross-cohort scores, folder and card.

    python -m scbert.model_cards.make_pbmc DATA --work DIR --output model_cards/scbert-mini-pbmc

DATA holds pbmc3k_10x.h5ad, zheng_facs_pbmc.h5ad and the files of OTHER_TISSUE. What stands in DIR already is not made
again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import anndata

from ..evaluation.run_benchmark.cells import LABEL, load_benchmark_cells
from ..training.pretrained import load_classifier, load_tokenizer
from .card import public_metrics
from .make_mini import HERE, run, save_small, write_card

COHORTS = {
    "pbmc3k_10x.h5ad": ("10x PBMC 3k, one healthy donor", "MIT"),
    "zheng_facs_pbmc.h5ad": ("PBMC sorted by surface markers, Zheng 2017", "BSD-2"),
}
LABEL_KEY = "cell_type"
LABELS = HERE / "scbert-mini-pbmc" / "labels.csv"
RECIPE = "pbmc"
CONTROLS = "logistic_l1,logistic_l2"
# what the annotator was never shown: how many of these cells does it leave unassigned?
OTHER_TISSUE = {
    "breast_tumor_copykat.h5ad": "breast tumour",
    "fetal_cortex_camp.h5ad": "fetal cortex",
    "scmixology_celseq_dropseq.h5ad": "lung cancer cell lines",
}
ABOUT = {
    "tissue": "human blood (PBMC of healthy donors, 10x 3' chemistry)",
    "trained_on": [f"{name}: {origin}" for name, (origin, _) in COHORTS.items()],
}


def cross_cohort(data: Path, work: Path) -> dict[str, Any]:
    """Learn one cohort, test the other, both ways, beside the controls."""
    output = work / "cross_cohort"
    if not output.exists():
        files = [data / name for name in COHORTS]
        options = (
            "--label-map",
            LABELS,
            "--group-key",
            "dataset",
            "--recipe",
            RECIPE,
            "--controls",
            CONTROLS,
        )
        run(
            "scbert", "evaluate", "leave-one-out", *files, "--label-key", LABEL_KEY, *options,
            "--settings", json.dumps({"disable_tqdm": True}), "--output", output,
        )  # fmt: skip
    return json.loads((output / "results.json").read_text())


def finetune(data: Path, work: Path) -> Path:
    """The annotator, from the cells of both cohorts."""
    model, cells = work / "annotator", work / "cells.h5ad"
    if not model.exists():
        joined = load_benchmark_cells([data / name for name in COHORTS], LABEL_KEY, LABELS)
        joined.write_h5ad(cells, compression="gzip")
        run("scbert", "finetune", cells, "--label-key", LABEL, "--recipe", RECIPE, "--output", model)
    return model


def other_tissues(data: Path, work: Path, model: Path) -> dict[str, dict[str, Any]]:
    """Share of the cells that are left unassigned where none is of a type the annotator knows."""
    found = {}
    for name, tissue in OTHER_TISSUE.items():
        output = work / f"annotated_{name}"
        if not output.exists():
            run("scbert", "annotate", data / name, "--model", model, "--output", output)
        called = anndata.read_h5ad(output, backed="r").obs["scbert_cell_type"].astype(str)
        wrong = called[called != "unassigned"].value_counts()
        found[name] = {
            "tissue": tissue,
            "cells": len(called),
            "unassigned": float((called == "unassigned").mean()),
            "commonest_wrong_call": None if wrong.empty else str(wrong.index[0]),
        }
    return found


def cross_cohort_section(result: dict[str, Any]) -> str:
    """The cross-cohort scores as a part of the card."""
    lines = [
        "## Across cohorts",
        "",
        "Learn one cohort and test all cells of the other whose type was learnt, both ways; the same recipe, panel and "
        "label map (`labels.csv`) as the weights here, which were then learnt from both. The controls learn from all "
        "genes the cohorts share, on log1p CP10k.",
        "",
        "| test cohort | model | cells | accuracy | macro-F1 |",
        "|---|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cohort = row["fold"].removeprefix("dataset ")
        lines.append(
            f"| {cohort} | {row['model']} | {row['cells']['test']:,} | {row['accuracy']:.3f} | {row['macro_f1']:.3f} |"
        )
    warnings = [f"- ⚠ {warning}" for warning in result["warnings"]]
    return "\n".join([*lines, "", *warnings, ""])


def other_tissue_section(found: dict[str, dict[str, Any]]) -> str:
    """What happens to cells the annotator should not name, as a part of the card."""
    lines = [
        "## Cells it does not know",
        "",
        "Every cell below is of another tissue and should be unassigned.",
        "",
        "| cells | unassigned | commonest wrong call |",
        "|---|---:|---|",
    ]
    for row in found.values():
        lines.append(
            f"| {row['tissue']} ({row['cells']:,}) | {row['unassigned']:.0%} | {row['commonest_wrong_call'] or ''} |"
        )
    return "\n".join([*lines, ""])


def origin_section() -> str:
    """Where the labelled cells come from."""
    rows = [f"| {name} | {origin} | {licence} |" for name, (origin, licence) in COHORTS.items()]
    return "\n".join(
        [
            "## Labelled cells",
            "",
            "| file | origin | licence of the repository it stood in |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def release(work: Path, output: Path, cross: dict[str, Any], others: dict[str, Any]) -> None:
    """The annotator's folder as it ships."""
    model, tokenizer = load_classifier(work / "annotator"), load_tokenizer(work / "annotator")
    save_small(model, tokenizer, output)
    metrics = public_metrics(json.loads((work / "annotator" / "metrics.json").read_text()))
    kept = {name: cross[name] for name in ("rows", "warnings", "settings", "versions")}
    contents = {
        "metrics": metrics,
        "cross_cohort": public_metrics(kept),
        "other_tissues": others,
        "annotator": ABOUT,
    }
    for name, content in contents.items():
        (output / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (output / "card_1_cells.md").write_text(origin_section())
    (output / "card_2_cross_cohort.md").write_text(cross_cohort_section(cross))
    (output / "card_3_other_tissues.md").write_text(other_tissue_section(others))
    (output / "confusion.png").write_bytes((work / "annotator" / "confusion.png").read_bytes())
    write_card(output)


def main() -> None:
    """Make what is missing, and the folder."""
    parser = argparse.ArgumentParser(prog="make_pbmc", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "scbert-mini-pbmc")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    cross = cross_cohort(options.data, options.work)
    model = finetune(options.data, options.work)
    release(options.work, options.output, cross, other_tissues(options.data, options.work, model))


if __name__ == "__main__":
    main()
