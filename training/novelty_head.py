"""
What tells that a cell is of none of the types learnt, and how sure a label has to be: by cells that were held out.

How far a cell lies from the nearest type, in the space of the cell vectors and in units of the scatter within types
(Mahalanobis; Lee et al. 2018), is taken relative to how far it lies from the mean of all cells (Ren et al. 2021):
cells of another study are farther from both. A cell is novel where that is more than for nearly all cells, each by what
was learnt without it (a conformal outlier test, Bates et al. 2023). Three quarters of the second distance are a middle:
all of it leaves what is far across the types' span, or beside a type that most cells are of, unseen; without it, many
cells of other chemistries are novel.
Leaving types out in turn and fitting the odds on them, with the energy of the logits beside the distance, was measured
and found half as many: types that differ little from a known one, which nothing tells, taught it to doubt the distance.
"""

import numpy as np
import scipy.sparse as sp
from scipy.optimize import brentq
from scipy.spatial.distance import cdist
from scipy.special import expit
from sklearn.covariance import LedoitWolf

from ..modeling_scbert.heads_scbert import ScBertNovelty
from .principal_axes import Axes, axes_by_products

# cells that a type needs to speak here, and cells that must speak in all
MIN_CELLS, ENOUGH_CELLS = 8, 40
# held-out cells keep this much of their probability in the mean
KNOWN_SHARE = 0.975
# by how much the log odds rise within a standard deviation of the held-out cells' distances
SHARPNESS = 20.0
# share of the held-out cells that may be lost, though their label is right, to novelty and threshold; and thresholds
MOST_LOST, THRESHOLDS = 0.03, np.linspace(0.3, 0.98, 69)
# share of the very cells learnt from that may look novel
MOST_OWN = 0.075
# held-out distances that differ by less, relative to their size, are all the same
LEAST_SPREAD = 1e-6


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
    """Squared distance to the nearest type less a share of that to the mean of all cells, the last center, [cells]."""
    squared = cdist(vectors, centers, "sqeuclidean")
    return squared[:, :-1].min(axis=1) - ScBertNovelty.SHARE_OF_ALL * squared[:, -1]


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


def novelty_of_cells(
    axes: Axes,
    products: np.ndarray | None,
    features: sp.csr_matrix,
    targets: np.ndarray,
    folds: np.ndarray,
    size: int,
    told: np.ndarray,
) -> tuple[int, np.ndarray, np.ndarray]:
    """
    How many axes tell what is novel, the `held_out_distances` of all cells along them, and the odds by those `told`.

    Of few cells most axes are noise that they happen to differ in. Other cells hardly differ along these, and by the
    scatter of others the very cells learnt from would be far from their type: the axes are halved, to two at the least,
    until nearly all of these are known. A query often holds its reference.
    """
    n_axes = size
    while True:
        distances = held_out_distances(axes, products, features, targets, folds, n_axes)
        odds = fit_novelty(distances[told])
        vectors, _ = whitened(axes.coordinates[:, :n_axes], targets)
        own = known_shares(relative_distance(vectors, all_centers(vectors, targets)), odds)
        if n_axes <= 2 or (own < 0.5).mean() <= MOST_OWN:
            return n_axes, distances, odds
        n_axes //= 2


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
    The distance at which a cell is as likely novel as known, and how the log odds rise with it, [2].

    By the `held_out_distances` of known cells: the odds rise steeply where these end, and the cells keep `KNOWN_SHARE`
    of their probability in the mean. Where all are alike they say nothing, and nothing is novel.

    Examples
    --------
    >>> odds = fit_novelty(np.random.default_rng(0).normal(size=1000))
    >>> known_shares(np.array([0.0, 1.0, 3.0]), odds).round(2).tolist()
    [1.0, 1.0, 0.0]
    """
    spread = distances.std()
    if spread <= LEAST_SPREAD * max(1.0, np.abs(distances).max()):
        return np.array([ScBertNovelty.NEVER, 1.0])
    slope = SHARPNESS / spread
    reach = 60 / slope
    even = brentq(
        lambda x: expit(slope * (x - distances)).mean() - KNOWN_SHARE,
        distances.min() - reach,
        distances.max() + reach,
    )
    return np.array([even, slope])


def known_shares(distances: np.ndarray, odds: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """What cells keep of their probabilities, [cells], as `ScBertNovelty` has it; the threshold is the model's."""
    even, slope = odds
    return np.maximum(expit(slope * (even - distances)), ScBertNovelty.least_share(threshold))


def choose_threshold(confidence: np.ndarray, right: np.ndarray) -> float:
    """
    The highest confidence below which cells may be left unassigned, `MOST_LOST` of the held-out ones unduly.

    It is one of `THRESHOLDS`, the lowest even where that loses more. By the confidence of held-out cells [cells],
    novelty and all, and whether their labels are right.

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
