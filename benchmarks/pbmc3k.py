"""
The two commands on 10x's 3k PBMCs: one fixed stratified 80/20 split, the 16,906-gene panel, on the CPU.

    python benchmarks/pbmc3k.py CELLS.h5ad PANEL.txt.gz --output DIR

Writes the split to DIR, runs `scbert finetune` and `scbert annotate` on it as processes of their own, and prints the
scores of the annotated file beside logistic regression learnt from the same 80%.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np

from scbert.data.labels import find_labels
from scbert.data.splits import stratified_split
from scbert.evaluation.baselines import BASELINES
from scbert.evaluation.metrics import classification_metrics, plot_confusion

LABEL_KEY = "cell_type"
SPLIT_SEED = 0


def write_split(cells: Path, folder: Path) -> tuple[Path, Path]:
    """Labelled cells, 80% of each type in one file and 20% in the other; "unassigned" ones are dropped."""
    adata = anndata.read_h5ad(cells)
    adata = adata[find_labels(adata.obs, LABEL_KEY) != None].copy()  # noqa: E711 (elementwise)
    _, classes = np.unique(adata.obs[LABEL_KEY].astype(str), return_inverse=True)
    splits = stratified_split(classes, 0.2, 0.0, seed=SPLIT_SEED)
    paths = folder / "train.h5ad", folder / "test.h5ad"
    for name, path in zip(("train", "test"), paths):
        adata[splits == name].write_h5ad(path, compression="gzip")
    return paths


def scbert(*arguments: str | Path) -> dict:
    """Run the command in a process of its own; its JSON line, and the seconds it took."""
    line = [str(argument) for argument in arguments]
    print("scbert", *line, file=sys.stderr)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "scbert", *line, "--json"], stdout=subprocess.PIPE, check=True, text=True
    )
    return {**json.loads(done.stdout), "wall_seconds": time.perf_counter() - start}


def annotate_and_score(test: Path, model: Path, output: Path, *options: str) -> dict:
    """Scores of an annotated file; a cell that is "unassigned" counts as wrong."""
    scbert("annotate", test, "--model", model, "--output", output, "--overwrite", *options)
    obs = anndata.read_h5ad(output, backed="r").obs
    return classification_metrics(obs[LABEL_KEY], obs["scbert_cell_type"])


def control_scores(train: Path, test: Path) -> dict[str, dict]:
    """Logistic regression, L1 and L2, C by inner cross-validation on the training cells."""
    learnt, held = anndata.read_h5ad(train), anndata.read_h5ad(test)
    scores = {}
    for name in ("logistic_l1", "logistic_l2"):
        baseline = BASELINES[name]().fit(learnt, LABEL_KEY)
        scores[name] = classification_metrics(held.obs[LABEL_KEY], baseline.predict(held))
    return scores


def main() -> None:
    """Split, fine-tune, annotate, score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("panel", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="pbmc3k")
    options = parser.parse_args()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    train, test = write_split(options.cells, folder)
    model = folder / "model"
    settings = ("--genes", options.panel, "--recipe", options.recipe, "--test", test, "--overwrite")
    tuned = scbert("finetune", train, "--label-key", LABEL_KEY, *settings, "--output", model)
    rows = {
        "scbert annotate --threshold 0": annotate_and_score(
            test, model, folder / "every.h5ad", "--threshold", "0"
        ),
        "scbert annotate": annotate_and_score(test, model, folder / "annotated.h5ad"),
        **control_scores(train, test),
    }
    plot_confusion(rows["scbert annotate"]["confusion"], folder / "confusion.png")
    print("| model | accuracy | macro-F1 |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['accuracy']:.3f} | {row['macro_f1']:.3f} |")
    print(f"fine-tuning took {tuned['wall_seconds'] / 60:.1f} min, {tuned['training']['epochs']:.0f} epochs")


if __name__ == "__main__":
    main()
