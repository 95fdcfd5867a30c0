"""
What tells that a cell is of none of the types learnt: fitted on types that are left out in turn.

Two facts speak of a cell. How much the logits say for any type at all (log-sum-exp, the negative energy of Liu et al.
2020); and how far the cell lies from the nearest type in the space of the cell vectors, in units of the scatter within
types (Mahalanobis; Lee et al. 2018), against how far it lies from the mean of all cells. A logistic regression of the
two, on cells of types that a fit was not shown beside held-out cells of those that it was, gives the log odds that a
cell is of none of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from joblib import Parallel, delayed
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, log_softmax, logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from .averaging import DEFAULT_PENALTY
from .logistic_head import ridge_path
from .principal_axes import Axes, axes_by_products

# simulations that are enough, cells each sees at most, cells that a type needs to be left out
MAX_LEFT_OUT = 20
MAX_CELLS = 3000
MIN_CELLS = 8
# mean log odds are shifted so that known cells keep this much of their probability
KNOWN_SHARE = 0.975


@dataclass
class Simulated:
    """Held-out cells of a fit that one type was left out of: is it novel, is the label right, probability, facts."""

    novel: np.ndarray
    right: np.ndarray
    confidence: np.ndarray
    facts: np.ndarray


def whitened(coordinates: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell vectors [cells, size] of coordinates along axes [cells, size], and the matrix that makes them."""
    coordinates = coordinates.astype(np.float64)
    whitener = whitening(coordinates, targets)
    return coordinates @ whitener, whitener


def whitening(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    Matrix [size, size] that gives cell vectors the same scatter within types in every direction.

    The covariance within types is shrunk (Ledoit-Wolf): there may be few cells.
    """
    centers = type_centers(vectors, targets)
    within = vectors - centers[np.unique(targets, return_inverse=True)[1]]
    if not within.any():
        # one cell a type: directions are taken as they are
        return np.eye(vectors.shape[1]) / max(vectors.std(), 1e-12)
    values, axes = np.linalg.eigh(LedoitWolf(assume_centered=True).fit(within).covariance_)
    return (axes / np.sqrt(np.maximum(values, 1e-9 * values.max()))) @ axes.T


def all_centers(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean vector of every type that has a cell, in order, and of all cells, [types + 1, size]."""
    return np.concatenate([type_centers(vectors, targets), vectors.mean(axis=0, keepdims=True)])


def type_centers(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean vector of every type that has a cell, in order, [types, size]."""
    _, index, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return sp.csr_matrix((1 / counts[index], (index, np.arange(len(index))))) @ vectors


def novelty_facts(logits: np.ndarray, vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """
    Negative log-sum-exp of the logits, and log ratio of two squared distances, [cells, 2].

    Of the distances, one is to the nearest type and the other to the mean of all cells, the last of the ``centers``:
    cells of another study lie farther from everything, and are no more novel for that.
    """
    squared = ((vectors[:, None] - centers[None]) ** 2).sum(axis=2) + 1e-9
    return np.stack(
        [-logsumexp(logits, axis=1), np.log(squared[:, :-1].min(axis=1) / squared[:, -1])], axis=1
    )


def facts_of_held_out(
    logits: np.ndarray,
    axes: Axes,
    products: np.ndarray | None,
    features: sp.csr_matrix,
    targets: np.ndarray,
    folds: np.ndarray,
    size: int,
) -> np.ndarray:
    """
    `novelty_facts` of every cell, [cells, 2], by axes, scatter and centers that it had no part in.

    Of cells that axes are not of, coordinates are smaller. Where there are so many that nobody took their `products`
    the difference is gone, and the `axes` of all serve.
    """
    facts = np.empty((len(targets), 2))
    for fold in np.unique(folds):
        held = folds == fold
        own = axes if products is None else axes_by_products(products, features, ~held, rank=size)
        index = np.unique(targets[~held], return_inverse=True)[1]
        facts[held] = _facts(logits[held], own.coordinates[:, :size], index, ~held, held)
    return facts


def _facts(logits, coordinates, index, learnt, held) -> np.ndarray:
    """Facts of the cells `held`, of which the logits are, by those `learnt`, of which the classes are."""
    vectors, whitener = whitened(coordinates[learnt], index)
    return novelty_facts(logits, coordinates[held] @ whitener, all_centers(vectors, index))


def simulate(
    axes: Axes,
    products: np.ndarray | None,
    features: sp.csr_matrix,
    targets: np.ndarray,
    folds: np.ndarray,
    size: int,
    on_fit: Callable[[], Any] | None = None,
) -> list[Simulated]:
    """
    Leave types out in turn, and look at them beside held-out cells of the others.

    Parameters
    ----------
    axes, products
        Of all cells; products of so many that nobody took them are those of their coordinates.
    features, targets, folds
        As in `logistic_head.solve_head`; the cells of fold 0 are held out.
    size
        Of the cell vectors.
    on_fit
        Called after each.

    Returns
    -------
    list of Simulated
        One for each of up to `MAX_LEFT_OUT` types with `MIN_CELLS` cells; none where fewer than three types have cells.
    """
    cells = _some_cells(targets)
    features, targets, folds = features[cells], targets[cells], folds[cells]
    types, counts = np.unique(targets, return_counts=True)
    left_out = types[np.argsort(-counts, kind="stable")][: (counts >= MIN_CELLS).sum()][:MAX_LEFT_OUT]
    if len(types) < 3 or not len(left_out):
        return []
    coordinates = axes.coordinates[cells]
    products = coordinates @ coordinates.T if products is None else products[np.ix_(cells, cells)]

    def run(left):
        found = _simulate_one(products, features, targets, folds, size, left)
        if on_fit is not None:
            on_fit()
        return found

    with threadpool_limits(1):
        return Parallel(n_jobs=os.cpu_count(), prefer="threads")(delayed(run)(left) for left in left_out)


def _some_cells(targets) -> np.ndarray:
    """All cells, or a part of every type."""
    share = min(1.0, MAX_CELLS / len(targets))
    kept = np.zeros(len(targets), dtype=bool)
    for name in np.unique(targets):
        cells = np.flatnonzero(targets == name)
        n = max(min(len(cells), MIN_CELLS), int(len(cells) * share))
        kept[np.random.default_rng(0).permutation(cells)[:n]] = True
    return np.flatnonzero(kept)


def _simulate_one(products, features, targets, folds, size, left) -> Simulated:
    novel = targets == left
    learnt, held = (folds != 0) & ~novel, (folds == 0) | novel
    known, index = np.unique(targets[learnt], return_inverse=True)
    # of types whose cells are all held out nothing can be right
    held &= novel | np.isin(targets, known)
    axes = axes_by_products(products, features, learnt, rank=min(200, learnt.sum()))
    ((coefficients, bias),) = ridge_path(axes.coordinates[learnt], index, len(known), (DEFAULT_PENALTY,))
    logits = axes.coordinates[held] @ coefficients.T + bias
    novel, true = novel[held], targets[held]
    logits /= _temperature(logits[~novel], np.searchsorted(known, true[~novel]))
    facts = _facts(logits, axes.coordinates[:, :size], index, learnt, held)
    right = known[logits.argmax(axis=1)] == true
    return Simulated(novel, right, softmax(logits, axis=1).max(axis=1), facts)


def _temperature(logits, targets) -> float:
    def loss(log_temperature):
        logs = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -logs[np.arange(len(targets)), targets].sum() + log_temperature**2

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def fit_novelty(simulated: list[Simulated]) -> np.ndarray:
    """
    Intercept and slopes of the log odds of novelty, [3], by all simulations; each type weighs as much as its others.

    The intercept is then lowered until known cells keep `KNOWN_SHARE` of their probability in the mean: how common new
    types are in a query, nobody knows.
    """
    facts = np.concatenate([one.facts for one in simulated])
    novel = np.concatenate([one.novel for one in simulated])
    weights = np.concatenate(
        [
            np.where(one.novel, 1 / max(1, one.novel.sum()), 1 / max(1, (~one.novel).sum()))
            for one in simulated
        ]
    )
    center, scale = facts.mean(axis=0), facts.std(axis=0) + 1e-9
    model = LogisticRegression().fit((facts - center) / scale, novel, sample_weight=weights / weights.mean())
    # more of a fact never speaks for a known type
    slopes = np.maximum(model.coef_[0], 0) / scale
    known = facts[~novel] @ slopes
    if not slopes.any():
        return np.array([-30.0, 0.0, 0.0])
    intercept = brentq(lambda x: expit(-x - known).mean() - KNOWN_SHARE, -known.max() - 60, -known.min() + 60)
    return np.array([intercept, *slopes])


def choose_threshold(
    simulated: list[Simulated], novelty: np.ndarray, least_known: float = 0.92, most_lost: float = 0.05
) -> float:
    """
    Confidence below which cells are best left unassigned.

    Two scores speak (Yang et al. 2022): the accuracy of known cells, and the share of novel cells called so, of those
    that are novel or called so. Both are means over the types left out; the first counts twice, since most cells of
    most queries are known, and it may not fall below `least_known`, or below what there is less `most_lost`.
    """
    confidences = [one.confidence * expit(-novelty[0] - one.facts @ novelty[1:]) for one in simulated]
    without = np.mean([one.right[~one.novel].mean() for one in simulated])
    needed = min(least_known, without - most_lost)
    best = (0.0, 0.5)
    for threshold in np.linspace(0.3, 0.98, 69):
        called = [confidence < threshold for confidence in confidences]
        known = np.mean([(s.right & ~c)[~s.novel].mean() for s, c in zip(simulated, called)])
        found = np.mean(
            [(s.novel & c).sum() / max(1, (s.novel | c).sum()) for s, c in zip(simulated, called)]
        )
        if known >= needed:
            best = max(best, (float(2 * known + found), float(threshold)))
    return round(best[1], 2)
