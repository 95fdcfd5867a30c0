"""
How many of the cells that `scbert annotate` leaves unassigned get a right wider type instead.

    python scripts/backoff.py CELLS                     # the table of docs/howto_annotate.md

Five folds of sets with fine and coarse labels, at most 1,500 cells each, annotated by default models of the other
folds. The threshold is the least at which 95% of the cells assigned a fine type have the right one; the cells that it
leaves unassigned are the ones in question. Their wider types must be right for 95% too: where they are not, they get
a threshold of their own.
"""

import argparse
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np

import evidence_studies
from evidence_studies import Study, cross_validation, read_study
from prediction_sets import MAX_CELLS, annotated_test
from scbert.data.label_tree import ancestors_of, tree_from_column
from scbert.inference.assignment import assign, back_off

PRECISION = 0.95
GRID = np.arange(0, 1, 0.005)
# file, column of fine labels, column of coarse ones or a tree
T_CELLS = {"Naive CD4 T": "CD4 T", "Memory CD4 T": "CD4 T", "CD4 T": "T", "CD8 T": "T"}
MONOCYTES = {"CD14+ Mono": "monocyte", "FCGR3A+ Mono": "monocyte"}
SYMPHONY = {"T_CD4": "T", "T_CD8": "T", "Mono_CD14": "monocyte", "Mono_CD16": "monocyte"}
SETS = (
    ("pbmc3k_10x", "cell_type", {**T_CELLS, **MONOCYTES, "T": "T or NK", "NK": "T or NK"}),
    ("zheng_facs_pbmc", "cell_type", "cell_type_coarse"),
    ("pbmc_symphony_2protocols", "cell_type", {**SYMPHONY, "T": "T or NK", "NK": "T or NK"}),
    ("breast_tnbc_wu_cid4465", "cell_type_minor", "cell_type"),
    ("pbmc_child_sle_subsets", "cell_subtype", "cell_type"),
    ("marrow_blood_triana_250", "cell_type_fine", "cell_type"),
)


def tree_of(data: Path, file: str, label_key: str, coarse: str | dict[str, str]) -> dict[str, str]:
    """Child -> parent."""
    if isinstance(coarse, dict):
        return coarse
    obs = anndata.read_h5ad(data / f"{file}.h5ad", backed="r").obs
    fine, wide = (obs[key].astype(str).to_numpy().astype(object) for key in (label_key, coarse))
    return tree_from_column(fine, wide, sorted(set(fine)), coarse)


def out_of_fold(study: Study) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities of cells by models of the other folds, [cells, types]; the true types; the names of the types."""
    names = sorted(set(study.labels))
    probabilities, true = [], []
    for task in cross_validation(study):
        annotated, known = annotated_test(task)
        part = np.zeros((annotated.n_obs, len(names)), dtype=np.float32)
        part[:, [names.index(name) for name in known]] = annotated.obsm["scbert_probabilities"]
        probabilities.append(part)
        true.append(task.true)
    return np.concatenate(probabilities), np.concatenate(true), names


def measured(probabilities: np.ndarray, true: np.ndarray, names: list[str], tree: dict[str, str]) -> dict:
    """What back-off gives the cells that a threshold of `PRECISION` leaves unassigned."""
    right = np.array(names)[probabilities.argmax(axis=1)] == true
    threshold = next(value for value in GRID if right[probabilities.max(axis=1) >= value].mean() >= PRECISION)
    unassigned = np.asarray(assign(probabilities, names, threshold)[0]) == "unassigned"
    above = {name: set(ancestors_of(name, tree)) for name in names}
    for wider_threshold in GRID[threshold <= GRID]:
        wider = np.asarray(back_off(probabilities[unassigned], names, wider_threshold, tree))
        answered = ~np.isin(wider, ["unassigned", *names])
        correct = np.array(
            [name in above[label] for name, label in zip(wider, true[unassigned], strict=True)]
        )
        if not answered.any() or correct[answered].mean() >= PRECISION:
            break
    return {
        "cells": len(true),
        "threshold": threshold,
        "unassigned": int(unassigned.sum()),
        "wider_threshold": wider_threshold,
        "wider": int(answered.sum()),
        "right": int(correct[answered].sum()),
    }


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="backoff", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    evidence_studies.MAX_CELLS = MAX_CELLS
    print(
        "| set | cells | thresholds | unassigned | of these given a wider type | of these right | right of unassigned |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for file, label_key, coarse in SETS:
        study = read_study(options.cells, file, label_key, None)
        found = measured(*out_of_fold(study), tree_of(options.cells, file, label_key, coarse))
        print(
            f"| {study.name} | {found['cells']:,} | {found['threshold']:.3f}, {found['wider_threshold']:.3f} | "
            f"{found['unassigned']} ({found['unassigned'] / found['cells']:.0%}) | {found['wider']} | "
            f"{found['right'] / max(1, found['wider']):.1%} | {found['right'] / max(1, found['unassigned']):.0%} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
