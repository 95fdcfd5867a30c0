"""Cells to train, validate and test on: splits and folds that others can repeat, and files of them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..tokenization import InputError
from .paths import atomic_path

SPLIT_COLUMNS = ("cell", "split")


def stratified_split(
    classes: np.ndarray, test_fraction: float, validation_fraction: float, seed: int = 0
) -> np.ndarray:
    """
    Give every cell a split so that each class has its share in each.

    A class has at least one cell in every split whose fraction is above 0, as long as it has cells enough: training
    comes first, then test, then validation. A class's cells are drawn by the seed and the class's place among the
    sorted classes, so that other classes do not change its draw.

    `classes` is the class of every cell, [cells]; the fractions are shares of the whole. What comes back is an object
    array [cells] of ``"train"``, ``"validation"`` and ``"test"``.
    """
    classes = np.asarray(classes)
    splits = np.full(len(classes), "train", dtype=object)
    for place, name in enumerate(np.unique(classes)):
        cells = np.flatnonzero(classes == name)
        cells = np.random.default_rng([seed, place]).permutation(cells)
        n_test = _share(len(cells), test_fraction, spare=1)
        n_validation = _share(len(cells), validation_fraction, spare=1 + n_test)
        splits[cells[:n_test]] = "test"
        splits[cells[n_test : n_test + n_validation]] = "validation"
    return splits


def _share(n: int, fraction: float, spare: int) -> int:
    """`fraction` of n cells, at least one, and `spare` of them left for others."""
    wanted = max(1, round(fraction * n)) if fraction > 0 else 0
    return max(0, min(wanted, n - spare))


def stratified_folds(classes: np.ndarray, n_folds: int, seed: int = 0) -> np.ndarray:
    """
    Give every cell a fold, 0..n_folds-1 [cells], so that each class is spread evenly over the folds.

    `classes` is the class of every cell, [cells]; one with fewer cells than folds is missing from some. Fewer than two
    folds, or more than cells, are refused.
    """
    classes = np.asarray(classes)
    if n_folds < 2:
        raise InputError(f"At least two folds are needed, not {n_folds}.")
    if len(classes) < n_folds:
        raise InputError(
            f"{len(classes)} cells cannot be spread over {n_folds} folds: there must be at least as many."
        )
    folds = np.empty(len(classes), dtype=int)
    rng = np.random.default_rng(seed)
    start = 0
    for name in np.unique(classes):
        cells = rng.permutation(np.flatnonzero(classes == name))
        # each class continues where the last one ended, so that the sizes of the folds differ by one at most
        folds[cells] = (start + np.arange(len(cells))) % n_folds
        start += len(cells)
    return folds


def write_split(path: str, cells: Sequence[str], split: Sequence, overwrite: bool = False) -> None:
    """
    Write which cell is in which split or fold, as CSV with the columns cell and split; in place only when complete.

    `cells` are names (`obs_names`), each once, `split` the name or number of each cell's split.
    """
    if len(set(cells)) < len(cells):
        raise InputError(
            "Cells share names, so a file could not tell them apart; make obs_names unique first."
        )
    table = pd.DataFrame(zip(cells, split, strict=True), columns=SPLIT_COLUMNS)
    with atomic_path(path, overwrite) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\r\n")


def read_split(path: str, cells: Sequence[str]) -> np.ndarray:
    """
    Read a file of `write_split` for these cells, in their order: an object array [cells] of str.

    The file may hold other cells too. One that is no such table, names a cell twice, or lacks one, is refused.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"There is no split file {path}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV file of splits ({error}).") from error
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
