"""Cells to train, validate and test on."""

import numpy as np


def stratified_split(
    classes: np.ndarray, test_fraction: float, validation_fraction: float, seed: int = 0
) -> np.ndarray:
    """
    Give every cell a split so that each class has its share in each.

    A class has at least one cell in every split whose fraction is above 0, as long as it has cells enough: training
    comes first, then test, then validation. A class's cells are drawn by the seed and the class's place among the
    sorted classes, so that other classes do not change its draw.

    Parameters
    ----------
    classes
        Class of every cell, [cells].
    test_fraction, validation_fraction
        Shares of the whole.
    seed
        Decides the draw.

    Returns
    -------
    numpy.ndarray
        Object array [cells] of ``"train"``, ``"validation"`` and ``"test"``.

    Examples
    --------
    >>> stratified_split(np.zeros(5, dtype=int), 0.2, 0.2).tolist().count("train")
    3
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
