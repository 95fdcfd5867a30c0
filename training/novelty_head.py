"""
What tells that a cell is of none of the types learnt, and how sure a label has to be: by cells that were held out.

How far a cell lies from the nearest type, in the space of the cell vectors and in units of the scatter within types
(Mahalanobis; Lee et al. 2018), is taken relative to how far it lies from the mean of all cells (Ren et al. 2021):
cells of another study are farther from both alike, and no more novel for that. A cell is novel where that is more
than for nearly all cells, each by what was learnt without it (a conformal outlier test, Bates et al. 2023).
Leaving types out in turn and fitting the odds on them, with the energy of the logits beside the distance, was measured
and found half as many: types that differ little from a known one, which nothing tells, taught it to doubt the distance.
"""

import numpy as np
import scipy.sparse as sp
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.covariance import LedoitWolf

from .principal_axes import Axes, axes_by_products

# cells that a type needs to speak here, and cells that must speak in all
MIN_CELLS, ENOUGH_CELLS = 8, 40
# held-out cells keep this much of their probability in the mean
KNOWN_SHARE = 0.975
# by how much the log odds rise within a standard deviation of the held-out cells' distances
SHARPNESS = 20.0
# share of the held-out cells that may be lost, though their label is right, to novelty and threshold; and thresholds
MOST_LOST, THRESHOLDS = 0.03, np.linspace(0.3, 0.98, 69)
# what a cell keeps of its probabilities however far it lies: less than the threshold by this, and this at most
BELOW_THRESHOLD, MOST_KEPT = 0.01, 0.8


def whitened(coordinates: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Cell vectors [cells, size] of coordinates along axes, and the matrix [size, size] that makes them of these.

    They have the same scatter within types in every direction. Its covariance is shrunk (Ledoit-Wolf): there may be few
    cells.
    """
    coordinates = coordinates.astype(np.float64)
    within = coordinates - type_centers(coordinates, targets)[np.unique(targets, return_inverse=True)[1]]
    if within.any():
        values, axes = np.linalg.eigh(LedoitWolf(assume_centered=True).fit(within).covariance_)
        whitener = (axes / np.sqrt(np.maximum(values, 1e-9 * values.max()))) @ axes.T
    else:
        # one cell a type: directions are taken as they are
        whitener = np.eye(coordinates.shape[1]) / max(coordinates.std(), 1e-12)
    return coordinates @ whitener, whitener


def all_centers(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean vector of every type that has a cell, in order, and of all cells, [types + 1, size]."""
    return np.concatenate([type_centers(vectors, targets), vectors.mean(axis=0, keepdims=True)])


def type_centers(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean vector of every type that has a cell, in order, [types, size]."""
    _, index, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return sp.csr_matrix((1 / counts[index], (index, np.arange(len(index))))) @ vectors


def relative_distance(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Squared distance to the nearest type less that to the mean of all cells, the last of the centers, [cells]."""
    squared = ((vectors[:, None] - centers[None]) ** 2).sum(axis=2)
    return squared[:, :-1].min(axis=1) - squared[:, -1]


def held_out_distances(
    axes: Axes,
    products: np.ndarray | None,
    features: sp.csr_matrix,
    targets: np.ndarray,
    folds: np.ndarray,
    size: int,
) -> np.ndarray:
    """
    `relative_distance` of every cell, [cells], by axes, scatter and centers that it had no part in.

    Of cells that axes are not of, coordinates are smaller. Where there are so many that nobody took their `products`
    the difference is gone, and the `axes` of all serve (see `principal_axes.axes_and_products`). The size is that of
    the cell vectors.
    """
    distances = np.empty(len(targets))
    for fold in np.unique(folds):
        held = folds == fold
        own = axes if products is None else axes_by_products(products, features, ~held, rank=size)
        coordinates, index = own.coordinates[:, :size], np.unique(targets[~held], return_inverse=True)[1]
        vectors, whitener = whitened(coordinates[~held], index)
        distances[held] = relative_distance(coordinates[held] @ whitener, all_centers(vectors, index))
    return distances


def telling_cells(targets: np.ndarray) -> np.ndarray:
    """
    Cells that can speak, bool [cells]: a type of few cells is another one without those held out. None if they are few.

    Examples
    --------
    >>> telling_cells(np.repeat([0, 1, 2], [40, 8, 3])).sum(), telling_cells(np.repeat([0, 1], 10)).sum()
    (np.int64(48), np.int64(0))
    """
    told = np.bincount(targets)[targets] >= MIN_CELLS
    return told if told.sum() >= ENOUGH_CELLS else np.zeros(len(targets), dtype=bool)


def fit_novelty(distances: np.ndarray) -> np.ndarray:
    """
    Intercept and slope of the log odds of novelty, [2], by the `held_out_distances` of known cells.

    The odds rise steeply where the distances of known cells end: those keep `KNOWN_SHARE` of their probability in the
    mean.

    Examples
    --------
    >>> intercept, slope = fit_novelty(np.random.default_rng(0).normal(size=1000))
    >>> expit(intercept + slope * np.array([0.0, 1.0, 3.0])).round(2).tolist()
    [0.0, 0.0, 1.0]
    """
    slope = SHARPNESS / (distances.std() + 1e-9)
    rises = slope * distances
    intercept = brentq(lambda x: expit(-x - rises).mean() - KNOWN_SHARE, -rises.max() - 60, -rises.min() + 60)
    return np.array([intercept, slope])


def known_shares(distances: np.ndarray, coefficients: np.ndarray, least: float = 0.0) -> np.ndarray:
    """
    What cells keep of their probabilities, [cells], by their distances and what `fit_novelty` found.

    How common new types are in a query nobody knows, and in most there is none: a cell that lies far off keeps so much
    (`least_share`) that it is left unassigned, as without it, and no surer of being new than that.
    """
    intercept, slope = coefficients
    return np.maximum(expit(-intercept - slope * distances), least)


def least_share(threshold: float) -> float:
    """What a cell keeps of its probabilities however far it lies: by the threshold it is left unassigned."""
    return min(threshold - BELOW_THRESHOLD, MOST_KEPT)


def choose_threshold(confidence: np.ndarray, right: np.ndarray) -> float:
    """
    The highest confidence below which cells may be left unassigned, `MOST_LOST` of the held-out ones unduly.

    By the confidence of held-out cells [cells], novelty and all, and whether their labels are right.

    Examples
    --------
    >>> choose_threshold(np.linspace(0, 1, 1001), np.ones(1001, dtype=bool))
    0.3
    >>> choose_threshold(np.linspace(0.5, 1, 1001), np.ones(1001, dtype=bool))
    0.51
    """
    enough = right.mean() - MOST_LOST
    kept = [threshold for threshold in THRESHOLDS if (right & (confidence >= threshold)).mean() >= enough]
    return round(float(max(kept, default=THRESHOLDS[0])), 2)
