"""Sets of labels that hold the true one as often as is asked for: conformal prediction, label by label."""

import numpy as np

COVERAGES = (0.8, 0.9, 0.95, 0.99)
# a class with fewer cells has no quantile of its own
MIN_CLASS_CELLS = 20


def conformal_quantiles(
    probabilities: np.ndarray, targets: np.ndarray, coverages: tuple[float, ...] = COVERAGES
) -> dict[str, list[float]]:
    """
    Largest score with which a class belongs to a cell's set, by coverage and class.

    The score is one less the probability of the class. A class with enough cells has the quantile of its own cells'
    scores, the others one of theirs together; where these too are too few, that of all cells.

    Parameters
    ----------
    probabilities
        Of cells that the model did not learn from, [cells, classes].
    targets
        Their true classes, [cells].
    coverages
        Shares of cells whose set is to hold the true class.

    Returns
    -------
    dict
        ``{"0.9": [classes], ...}``; a coverage that asks for more cells than there are is left out.

    Notes
    -----
    Least ambiguous sets with class-wise coverage (Sadinle, Lei and Wasserman, JASA 2019), label-conditional conformal
    prediction (Vovk, 2012). For one fixed model and cells drawn like these, each class's coverage is at least the one
    asked for, in finite samples: the quantile has rank ceil((n + 1) coverage). Scores of cross-fitting are not quite
    this: each is of a fit without the cell, and the model that is used has learnt from all cells. It is then right as
    far as the fits agree (Barber, Candes, Ramdas and Tibshirani, Annals of Statistics 2021, on the jackknife), and it
    holds for cells like the reference's only: not across donors or protocols.

    Examples
    --------
    >>> sure = np.linspace(0.505, 1, 100)
    >>> found = conformal_quantiles(np.column_stack([sure, 1 - sure]), np.zeros(100, dtype=int), (0.9,))
    >>> np.round(found["0.9"][0], 3).item()
    0.45
    """
    scores = nonconformity(probabilities[np.arange(len(targets)), targets])
    counts = np.bincount(targets, minlength=probabilities.shape[1])
    found = {}
    for coverage in coverages:
        everything = _quantile(scores, coverage)
        if np.isinf(everything):
            continue
        least = max(MIN_CLASS_CELLS, round(1 / (1 - coverage)))
        small = counts < least
        together = _quantile(scores[small[targets]], coverage)
        rest = everything if np.isinf(together) else together
        found[f"{coverage:g}"] = [
            rest if small[name] else _quantile(scores[targets == name], coverage)
            for name in range(probabilities.shape[1])
        ]
    return found


def nonconformity(probabilities: np.ndarray) -> np.ndarray:
    """One less the probability, in float32: what is written for a cell, so that ties are ties."""
    return 1 - np.asarray(probabilities, dtype=np.float32)


def in_set(probabilities: np.ndarray, quantiles: list[float]) -> np.ndarray:
    """
    Which classes belong to each cell's set, bool [cells, classes].

    Parameters
    ----------
    probabilities
        [cells, classes]. A class of probability 0 belongs to no set.
    quantiles
        Of one coverage: see `conformal_quantiles`, [classes].

    Examples
    --------
    >>> in_set(np.array([[0.9, 0.1], [0.5, 0.5]]), [0.2, 0.6]).tolist()
    [[True, False], [False, True]]
    """
    return (nonconformity(probabilities) <= np.asarray(quantiles, dtype=np.float32)) & (probabilities > 0)


def _quantile(scores: np.ndarray, coverage: float) -> float:
    """The score of rank ceil((n + 1) coverage); infinite where there are too few."""
    # less than a rounding error, so that 0.9 of 10 is 9
    rank = int(np.ceil((len(scores) + 1) * coverage - 1e-9))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")
