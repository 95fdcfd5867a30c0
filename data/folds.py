"""Splits that others can repeat: folds, whole donors kept together, files of them."""

import csv
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..tokenization import InputError
from .output import atomic_path

SPLIT_COLUMNS = ("cell", "split")


def stratified_folds(classes: np.ndarray, n_folds: int, seed: int = 0) -> np.ndarray:
    """
    Give every cell a fold so that each class is spread evenly over the folds.

    Parameters
    ----------
    classes
        Class of every cell, [cells].
    n_folds
        Number of folds.
    seed
        Decides the draw.

    Returns
    -------
    numpy.ndarray
        int [cells], 0..n_folds-1. A class with fewer cells than folds is missing from some.

    Raises
    ------
    InputError
        If there are fewer than two folds, or more folds than cells.

    Examples
    --------
    >>> np.bincount(stratified_folds(np.zeros(10), 5)).tolist()
    [2, 2, 2, 2, 2]
    """
    classes = np.asarray(classes)
    _check_folds(n_folds, len(classes), "cells")
    folds = np.empty(len(classes), dtype=int)
    rng = np.random.default_rng(seed)
    start = 0
    for name in np.unique(classes):
        cells = rng.permutation(np.flatnonzero(classes == name))
        # each class goes on where the last one ended, so the folds' sizes differ by one at most
        folds[cells] = (start + np.arange(len(cells))) % n_folds
        start += len(cells)
    return folds


def group_folds(groups: np.ndarray, classes: np.ndarray, n_folds: int, seed: int = 0) -> np.ndarray:
    """
    Give every cell a fold so that no group (donor, run) is in two folds.

    Groups are placed from the largest to the smallest, each into the fold where it leaves the classes
    spread most evenly.

    Parameters
    ----------
    groups, classes
        Group and class of every cell, [cells].
    n_folds
        Number of folds; at most the number of groups.
    seed
        Decides between equals.

    Returns
    -------
    numpy.ndarray
        int [cells], 0..n_folds-1.
    """
    weights = np.full(n_folds, 1.0 / max(n_folds, 1))
    return _place_groups(groups, classes, weights, seed)


def group_split(
    groups: np.ndarray, classes: np.ndarray, test_fraction: float, validation_fraction: float, seed: int = 0
) -> np.ndarray:
    """
    Like `stratified_split`, with no group (donor, run) in two splits; the shares are as near as groups allow.

    Returns
    -------
    numpy.ndarray
        Object array [cells] of ``"train"``, ``"validation"`` and ``"test"``.
    """
    names = ["train", "validation", "test"]
    weights = np.array([1.0 - test_fraction - validation_fraction, validation_fraction, test_fraction])
    if min(test_fraction, validation_fraction) < 0 or test_fraction + validation_fraction > 1 - 1e-9:
        raise InputError("The shares of test and validation cells must be from 0 to less than 1 together.")
    used = np.flatnonzero(weights)
    return np.array(names, dtype=object)[used][_place_groups(groups, classes, weights[used], seed)]


def _place_groups(groups: np.ndarray, classes: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Part of every cell: each group goes where the squared distance from the wanted shares grows least."""
    group_names, group = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    class_names, label = np.unique(np.asarray(classes).astype(str), return_inverse=True)
    _check_folds(len(weights), len(group_names), "groups")
    table = np.zeros((len(group_names), len(class_names)))
    np.add.at(table, (group, label), 1)
    wanted = weights[:, None] * table.sum(0)
    order = np.random.default_rng(seed).permutation(len(group_names))
    order = order[np.argsort(-table[order].sum(1), kind="stable")]
    placed, part_of = np.zeros_like(wanted), np.empty(len(group_names), dtype=int)
    for place, g in enumerate(order):
        # classes count alike, however rare; a part still empty comes first once groups run short
        scale = np.maximum(table.sum(0), 1)
        growth = (((placed + table[g] - wanted) / scale) ** 2 - ((placed - wanted) / scale) ** 2).sum(1)
        empty = placed.sum(1) == 0
        if empty.sum() >= len(order) - place:
            growth[~empty] = np.inf
        part_of[g] = int(np.argmin(growth))
        placed[part_of[g]] += table[g]
    return part_of[group]


def _check_folds(n_folds: int, n: int, what: str) -> None:
    if n_folds < 2:
        raise InputError(f"At least two folds are needed, not {n_folds}.")
    if n < n_folds:
        raise InputError(f"{n} {what} cannot be spread over {n_folds} parts; there must be as many at least.")


def write_split(path: str, cells: Sequence[str], split: Sequence, overwrite: bool = False) -> None:
    """
    Write which cell is in which split or fold, as CSV with the columns cell and split.

    Parameters
    ----------
    path
        Output; in place only when complete.
    cells
        Names of the cells (`obs_names`), each once.
    split
        Name or number of each cell's split.
    overwrite
        Replace an existing file.
    """
    if len(set(cells)) < len(cells):
        raise InputError(
            "Cells share names, so a file could not tell them apart; make obs_names unique first."
        )
    with (
        atomic_path(path, overwrite) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(SPLIT_COLUMNS)
        writer.writerows(zip(cells, split, strict=True))


def read_split(path: str, cells: Sequence[str]) -> np.ndarray:
    """
    Read a file of `write_split` for these cells.

    Parameters
    ----------
    path
        CSV with the columns cell and split.
    cells
        Names of the cells wanted, in order; the file may hold others too.

    Returns
    -------
    numpy.ndarray
        Object array [cells] of str.

    Raises
    ------
    InputError
        If the file is no such table, names a cell twice, or lacks one.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"There is no split file {path}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV file of splits ({error}).") from error
    if not set(SPLIT_COLUMNS) <= set(table.columns):
        raise InputError(f"{path} needs the columns cell and split; it has: {', '.join(table.columns)}.")
    if table["cell"].duplicated().any():
        raise InputError(f"{path} names {int(table['cell'].duplicated().sum())} cell(s) more than once.")
    found = table.set_index("cell")["split"].reindex(list(cells))
    if found.isna().any():
        missing = [str(cell) for cell in found.index[found.isna()]]
        raise InputError(
            f"{path} lacks {len(missing)} of the {len(found)} cells (first: {', '.join(missing[:3])})."
        )
    return found.to_numpy(dtype=object)
