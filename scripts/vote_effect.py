"""
Whether a majority vote by Leiden clusters helps: half of each file is learnt from, the other half annotated.

    python scripts/vote_effect.py pbmc.h5ad:cell_type tumour.h5ad:cell_type_major
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import scbert
from scbert.data.labels import find_labels
from scbert.data.read import read_cells
from scbert.data.splits import stratified_split
from scbert.evaluation.metrics import classification_metrics


def effect(path: str, label_key: str, folder: Path) -> list[str]:
    """A row of the table: scores of the cells' own types and of their groups'."""
    cells = read_cells(path)
    labels = find_labels(cells.obs, label_key)
    cells = cells[[label is not None for label in labels]].copy()
    _, classes = np.unique(cells.obs[label_key].astype(str), return_inverse=True)
    held_out = stratified_split(classes, 0.5, 0.0, seed=0) == "test"
    cells[~held_out].write_h5ad(folder / "reference.h5ad")
    model = scbert.finetune(folder / "reference.h5ad", label_key, folder / "model", overwrite=True)
    query = cells[held_out].copy()
    # no threshold, so that every cell has a vote
    found = model.annotate(query, threshold=0, majority_vote="leiden", progress=False)
    true, row = found.obs[label_key].astype(str), [f"{Path(path).stem}, {query.n_obs:,} cells"]
    for column in ("scbert_cell_type", "scbert_majority_vote"):
        if column not in found.obs:
            return [*row, "left out: most clusters are mixed"]
        scores = classification_metrics(true, found.obs[column].astype(str))
        row.append(f"{scores['accuracy']:.3f} / {scores['macro_f1']:.3f}")
    groups = found.uns["scbert"]["majority_vote"]
    return [*row, f"{groups['mixed']} of {len(groups['group'])}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="vote_effect", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", nargs="+", metavar="FILE.h5ad:LABEL_KEY", help="Labelled cells.")
    options = parser.parse_args()
    print("| cells | each cell's own type | its group's | mixed groups |\n|---|---:|---:|---:|")
    for argument in options.cells:
        path, _, label_key = argument.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            print("| " + " | ".join(effect(path, label_key, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
