"""From probabilities to labels: the likeliest or "unassigned", a wider type, a set of labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..data.cell_ontology import UNKNOWN_TERM
from ..data.disk_matrix import DiskMatrix
from ..data.label_tree import ancestors_of
from ..data.labels import UNASSIGNED
from ..data.read import row_blocks
from ..evaluation.calibration import in_set

# a cell looks like no known type whose probabilities sum to less; share of such cells beyond which cells differ from
# those learnt; of held-out ones it is 0.025 in the mean (`training.novelty_head.KNOWN_SHARE`)
LOOKS_NOVEL, MOST_NOVEL = 0.9, 0.1
# all columns of obs that an annotation may write
COLUMNS = (
    "scbert_cell_type",
    "scbert_confidence",
    "scbert_cell_type_ontology_term_id",
    "scbert_cell_type_backoff",
    "scbert_cell_type_backoff_ontology_term_id",
    "scbert_prediction_set",
    "scbert_majority_vote",
    "scbert_majority_share",
    "scbert_majority_confidence",
    "scbert_leiden",
)


def assign(
    probabilities: np.ndarray | DiskMatrix, names: list[str], threshold: float
) -> tuple[pd.Categorical, np.ndarray]:
    """
    Label and confidence (float32) of every cell, of its probabilities [cells, labels].

    Below the threshold a cell is "unassigned", and always with confidence 0: without expression all its probabilities
    are 0. The categories of the labels are those that occur, in the model's order, "unassigned" last.

    Examples
    --------
    >>> assign(np.array([[0.9, 0.1], [0.4, 0.3]]), ["B", "T"], 0.5)[0].tolist()
    ['B', 'unassigned']
    """
    order = list(dict.fromkeys([*names, UNASSIGNED]))
    # two columns may have one name
    code_of_column = np.array([order.index(name) for name in names], dtype=np.int16)
    codes = np.empty(len(probabilities), dtype=np.int16)
    confidence = np.empty(len(probabilities), dtype=np.float32)
    for block in row_blocks(len(probabilities)):
        values = probabilities[block]
        largest = values.max(axis=1)
        codes[block] = code_of_column[values.argmax(axis=1)]
        codes[block][(largest < threshold) | (largest == 0)] = order.index(UNASSIGNED)
        confidence[block] = largest
    return pd.Categorical.from_codes(codes, order).remove_unused_categories(), confidence


def back_off(
    probabilities: np.ndarray | DiskMatrix, names: list[str], threshold: float, parents: dict[str, str]
) -> pd.Categorical:
    """
    The label of every cell, or where it is unsure the deepest type above whose labels together are likely enough.

    `probabilities` and `names` are as in `assign`; `parents` is the tree, child -> parent, in which a label may itself
    be above others. A label, or the sum of the labels below a type, has to reach the threshold; a cell is "unassigned"
    where not even the topmost types do.

    Examples
    --------
    >>> unsure = np.array([[0.1, 0.4, 0.5], [0.4, 0.3, 0.3], [0.9, 0.1, 0.0]])
    >>> back_off(unsure, ["B", "CD4", "CD8"], 0.8, {"CD4": "T", "CD8": "T"}).tolist()
    ['T', 'unassigned', 'B']
    """
    paths = [[name, *ancestors_of(name, parents)] for name in names]
    nodes = list(dict.fromkeys([*names, *(node for path in paths for node in path)]))
    order = [*nodes, UNASSIGNED]
    below = np.array([[node in path for node in nodes] for path in paths], dtype=np.float32)
    depths = np.array([len(ancestors_of(node, parents)) for node in nodes])
    of_label = np.array([nodes.index(name) for name in names])
    codes = np.empty(len(probabilities), dtype=np.int32)
    for block in row_blocks(len(probabilities)):
        values = probabilities[block]
        sums = values @ below
        # the deepest, and of equally deep ones the likeliest
        rank = np.where((sums >= threshold) & (sums > 0), depths + sums / 2, -1)
        found = np.where(rank.max(axis=1) >= 0, rank.argmax(axis=1), len(nodes))
        largest = values.max(axis=1)
        sure = (largest >= threshold) & (largest > 0)
        codes[block] = np.where(sure, of_label[values.argmax(axis=1)], found)
    return pd.Categorical.from_codes(codes, order).remove_unused_categories()


def ontology_terms(labels: pd.Categorical, term_ids: dict[str, str]) -> pd.Categorical:
    """Terms of the Cell Ontology by cell; "unknown" without one, as CELLxGENE's schema wants it."""
    # two labels may have one term
    codes, terms = pd.factorize(
        np.array([term_ids.get(name, UNKNOWN_TERM) for name in labels.categories], object)
    )
    return pd.Categorical.from_codes(codes[labels.codes], terms)


def prediction_sets(
    probabilities: np.ndarray | DiskMatrix, names: list[str], quantiles: list[float]
) -> tuple[pd.Categorical, np.ndarray]:
    """
    The labels that a cell may have, at the coverage that the quantiles are of, and cells by size of their set.

    `probabilities` and `names` are as in `assign`; `quantiles` [labels] are of
    `scbert.evaluation.calibration.conformal_quantiles`. A set holds its labels in the model's order, joined by "|", and
    is "" where it is empty. The sizes are [labels + 1].

    Examples
    --------
    >>> sets, sizes = prediction_sets(np.array([[0.6, 0.4], [0.95, 0.05]]), ["CD4", "CD8"], [0.5, 0.7])
    >>> sets.tolist(), sizes.tolist()
    (['CD4|CD8', 'CD4'], [0, 1, 1])
    """
    code_of: dict[str, int] = {}
    codes, sizes = np.empty(len(probabilities), dtype=np.int32), np.zeros(len(names) + 1, dtype=int)
    for block in row_blocks(len(probabilities)):
        members = in_set(probabilities[block], quantiles)
        sizes += np.bincount(members.sum(axis=1), minlength=len(names) + 1)
        distinct, which = np.unique(members, axis=0, return_inverse=True)
        texts = ["|".join(name for name, is_in in zip(names, row, strict=True) if is_in) for row in distinct]
        places = np.array([code_of.setdefault(text, len(code_of)) for text in texts], dtype=np.int32)
        codes[block] = places[which.ravel()]
    return pd.Categorical.from_codes(codes, list(code_of)), sizes


def set_sizes(coverage: float, sizes: np.ndarray) -> dict[str, Any]:
    """
    Sizes of prediction sets for a summary.

    Examples
    --------
    >>> set_sizes(0.9, np.array([0, 3, 1]))
    {'coverage': 0.9, 'mean_size': 1.25, 'cells_per_size': {'1': 3, '2': 1}}
    """
    mean = float(sizes @ np.arange(len(sizes)) / sizes.sum())
    return {
        "coverage": float(coverage),
        "mean_size": mean,
        "cells_per_size": {str(size): int(count) for size, count in enumerate(sizes) if count},
    }


def novel_share(probabilities: np.ndarray | DiskMatrix) -> float:
    """
    Share of the cells with expression that look like none of the types learnt.

    Examples
    --------
    >>> novel_share(np.array([[0.7, 0.3], [0.1, 0.5], [0.0, 0.0]]))
    0.5
    """
    novel = n_cells = 0
    for block in row_blocks(len(probabilities)):
        sums = probabilities[block].sum(axis=1)
        novel, n_cells = novel + ((sums > 0) & (sums < LOOKS_NOVEL)).sum(), n_cells + (sums > 0).sum()
    return float(novel / max(n_cells, 1))


def shift_notes(probabilities: np.ndarray | DiskMatrix) -> list[str]:
    """A warning where so many cells look like no type learnt that no coverage can be promised for them."""
    share = novel_share(probabilities)
    if share <= MOST_NOVEL:
        return []
    return [
        f"These cells differ from those that the model learnt from ({share:.0%} look like none of its types, "
        f"{MOST_NOVEL:.0%} at most where they do not): prediction sets may hold the true type less often than asked "
        "for."
    ]


def set_words(sets: dict[str, Any]) -> str:
    """The same in words."""
    counts = sets["cells_per_size"]
    several = sum(count for size, count in counts.items() if int(size) > 1)
    return (
        f"Prediction sets (coverage {sets['coverage']:g}): {counts.get('1', 0):,} cells have one type, {several:,} "
        f"several, {counts.get('0', 0):,} none; {sets['mean_size']:.2f} types a cell in the mean."
    )


def wider_answers(
    probabilities: np.ndarray | DiskMatrix,
    names: list[str],
    threshold: float,
    labels: pd.Categorical,
    config: Any,
) -> dict[str, pd.Categorical]:
    """Columns of obs that a model has which knows terms of the Cell Ontology, or types above its own."""
    columns, terms = {}, config.label_ontology_ids
    if terms:
        columns["scbert_cell_type_ontology_term_id"] = ontology_terms(labels, terms)
    if config.label_parents:
        wider = back_off(probabilities, names, threshold, config.label_parents)
        columns["scbert_cell_type_backoff"] = wider
        if terms:
            columns["scbert_cell_type_backoff_ontology_term_id"] = ontology_terms(wider, terms)
    return columns
