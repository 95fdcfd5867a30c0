"""Confidence that means something: temperature, calibration errors, the threshold of "unassigned", prediction sets."""

from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require

# of prediction sets
COVERAGES = (0.8, 0.9, 0.95, 0.99)
# a class with fewer cells has no quantile of its own
MIN_CLASS_CELLS = 20


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of logits divided by a temperature, [cells, classes] float64."""
    return require("scipy.special").softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, prior: float = 0.0) -> float:
    """
    The one number that, dividing the logits, makes validation cells likeliest.

    Logits [cells, classes] and class indices [cells] are of cells that the model did not learn from. Above 1 it was
    too sure of itself, below 1 not sure enough; predicted classes don't change. A value at 0.05 or 20, the bounds of
    the search, means that the cells are (nearly) all right or all wrong, and tell nothing about calibration. `prior` is
    the weight, in cells, of the belief that the logarithm is near 0: what keeps few cells from the bounds.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017. The loss is convex in 1/temperature, so
    a bounded scalar search finds the minimum.
    """
    logits, labels = _checked(logits, labels)
    log_softmax = require("scipy.special").log_softmax

    def loss(log_temperature):
        belief = prior / len(labels) * log_temperature**2 / 2
        logs = log_softmax(logits / np.exp(log_temperature), axis=1)
        return belief - logs[np.arange(len(labels)), labels].mean()

    minimize = require("scipy.optimize").minimize_scalar
    result = minimize(loss, bounds=np.log([0.05, 20.0]), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(result.x))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> float:
    """
    Mean gap between confidence and accuracy over equal-width bins of the largest probability, weighted by cells.

    Of probabilities [cells, classes] and true classes [cells]; Naeini et al. 2015.
    """
    cells, confidence, right = _by_confidence(*_checked(probabilities, labels), n_bins)
    return float(np.abs(right - confidence).sum() / cells.sum())


def _by_confidence(
    probabilities: np.ndarray, labels: np.ndarray, n_bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, summed confidence and right answers of equal bins of the confidence, each closed on its right, [bins]."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    # a cell without any probability has no class, and not the first
    right &= confidence > 0
    index = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    cells = np.bincount(index, minlength=n_bins)
    return cells, *(np.bincount(index, weights, minlength=n_bins) for weights in (confidence, right))


def choose_threshold(
    probabilities: np.ndarray, labels: np.ndarray, precision: float = 0.95, min_cells: int = 20
) -> float | None:
    """
    The lowest confidence threshold whose assigned validation cells reach a wanted share of right answers.

    Of calibrated probabilities [cells, classes] and true classes [cells]; -1 is a cell of none of them, wrong wherever
    it is assigned. At least `min_cells` must stay assigned: a precision measured on a handful says nothing. None where
    there are fewer, or none reach the precision.

    It lies halfway between the last confidence kept and the next one left out; where every cell is kept, just below the
    lowest confidence seen, so that nothing is claimed about lower ones.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    order = np.argsort(-confidence, kind="stable")
    ranked, hits = confidence[order], np.cumsum(right[order])
    kept = np.arange(1, len(ranked) + 1)
    # cells of equal confidence stand or fall together: only the last of each run is a possible cut.
    is_cut = np.append(ranked[1:] < ranked[:-1], True)[: len(ranked)]
    good = np.flatnonzero(is_cut & (kept >= min_cells) & (hits >= precision * kept))
    if not len(good):
        return None
    last = good[-1]
    below = (ranked[last] + ranked[last + 1]) / 2 if last + 1 < len(ranked) else ranked[last] - 1e-6
    return float(below)


def plot_reliability(probabilities: np.ndarray, labels: np.ndarray, path: str | Path) -> Any:
    """
    Reliability diagram: accuracy against confidence, with the number of cells of each of ten equal bins below.

    Of probabilities [cells, classes] and true classes [cells]; saved as `path`, and returned as matplotlib's Figure.
    """
    values, truth = _checked(probabilities, labels)
    cells, confidence, right = _by_confidence(values, truth, 10)
    seen = cells > 0
    accuracy, mean = right[seen] / cells[seen], confidence[seen] / cells[seen]
    error = expected_calibration_error(values, truth)
    figure = require("matplotlib.figure").Figure(figsize=(4.6, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    above.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect")
    above.plot(mean, accuracy, marker="o", markersize=4, label=f"model (ECE {error:.3f})")
    below.stairs(cells, np.linspace(0, 1, 11), color="C0", linewidth=1.4)
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    # above the axes: a curve may pass anywhere inside.
    above.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    below.set(xlabel="confidence (largest probability)", ylabel="cells")
    figure.savefig(path, dpi=150)
    return figure


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            "scores [cells, classes] and one class index per cell are needed; "
            f"got {scores.shape} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"labels must be class indices between 0 and {scores.shape[1] - 1}")
    return scores, labels.astype(np.int64)


def conformal_quantiles(
    probabilities: np.ndarray, targets: np.ndarray, coverages: tuple[float, ...] = COVERAGES
) -> dict[str, list[float]]:
    """
    Largest score with which a class belongs to a cell's set, by coverage and class: ``{"0.9": [classes], ...}``.

    `probabilities` [cells, classes] are of cells with these true classes that the model did not learn from, `coverages`
    the shares of cells whose set is to hold the true class; one that asks for more cells than there are is left out.

    The score is one less the probability of the class. A class with enough cells has the quantile of its own cells'
    scores, the others one of theirs together; where these too are too few, that of all cells.

    Least ambiguous sets with class-wise coverage (Sadinle, Lei and Wasserman, JASA 2019), label-conditional conformal
    prediction (Vovk, 2012). For one fixed model and cells drawn like these, each class's coverage is at least the one
    asked for, in finite samples: the quantile has rank ceil((n + 1) coverage). Scores of cross-fitting are not quite
    this: each is of a fit without the cell, and the model that is used has learnt from all cells. It is then right as
    far as the fits agree (Barber, Candes, Ramdas and Tibshirani, Annals of Statistics 2021, on the jackknife), and it
    holds for cells like the reference's only: not across donors or protocols.
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
    Which classes belong to each cell's set, bool [cells, classes], by the `conformal_quantiles` of one coverage.

    A class of probability 0 belongs to no set.

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
