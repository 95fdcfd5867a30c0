"""
What differs between studies and not between types of cells, and how regressions are kept from leaning on it.

The mean expression of a type scatters over studies (people, protocols, chemistries) along a few directions of the
genes. A classifier that leans on them fails on the next study, and held-out cells of its own study cannot tell. So
features are damped along them before a ridge-penalised regression sees them, which is the same as to penalise weights
along them more than others (within-class covariance normalisation, Hatch et al. 2006, with studies of a type in the
place of sessions of a speaker).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

# by how much a direction is damped, for its scatter between studies in units of that of cells
STRENGTH = 200.0
# directions that are kept, and cells of a type in a study that have a mean worth comparing
DIRECTIONS, FEWEST_CELLS = 20, 20


@dataclass
class Damping:
    """
    The matrix (1 + E'E / s)^(-1/2) [genes, genes], for effects E [n, genes] and the cells' mean squared norm s.

    Attributes
    ----------
    directions
        At right angles, of length 1, [n, genes].
    lost
        What features lose along each, from 0 to 1, [n].
    """

    directions: np.ndarray
    lost: np.ndarray

    @classmethod
    def of(cls, effects: np.ndarray, features: sp.csr_matrix) -> "Damping":
        """By effects in the units of the features [cells, genes]."""
        squares, vectors = np.linalg.eigh(effects.astype(np.float64) @ effects.T)
        kept = squares > 1e-9 * squares.max(initial=1e-30)
        squares, vectors = squares[kept], vectors[:, kept]
        directions = (vectors / np.sqrt(squares)).T @ effects
        return cls(directions, 1 - (1 + squares / mean_squared_norm(features)) ** -0.5)

    def weights(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the features [n, genes] that give what these give on damped features."""
        return weights - (weights @ self.directions.T * self.lost) @ self.directions

    def products(self, features: sp.csr_matrix) -> np.ndarray:
        """By how much inner products of cells [cells, cells] are less than without it."""
        along = (features @ self.directions.T).astype(np.float32)
        return along * (2 * self.lost - self.lost**2).astype(np.float32) @ along.T


def mean_squared_norm(features: sp.csr_matrix) -> float:
    """Of cells [cells, genes] less their mean."""
    center = np.asarray(features.mean(axis=0), dtype=np.float64).ravel()
    return float(features.multiply(features).sum() / features.shape[0] - center @ center) or 1.0


def in_units_of(features: sp.csr_matrix, effects: np.ndarray) -> np.ndarray:
    """Effects [n, genes], in units of the cells' scatter, for features [cells, genes and more]; with their strength."""
    wide = np.pad(effects, ((0, 0), (0, features.shape[1] - effects.shape[1])))
    return wide * (STRENGTH * mean_squared_norm(features)) ** 0.5


def batch_effects(means: np.ndarray, types: Sequence[str]) -> np.ndarray:
    """
    Directions in which the means of a type differ between batches, with their scatter as length, [n, genes].

    Parameters
    ----------
    means
        Of a type in a batch each, [means, genes]; NaN for genes that a batch has not measured.
    types
        Of each.

    Examples
    --------
    >>> means = np.array([[1.0, 5.0], [3.0, 5.0], [7.0, 2.0]])
    >>> np.abs(batch_effects(means, ["B cell", "B cell", "T cell"])).round(3).tolist()
    [[1.414, 0.0]]
    """
    groups = pd.DataFrame(means).groupby(np.asarray(types))
    sizes = groups[0].transform("size").to_numpy()
    seen = sizes > 1
    if not seen.any():
        return np.zeros((0, means.shape[1]))
    differences = (means - groups.transform("mean").to_numpy())[seen]
    # a mean of n lies closer to each of them than the true one
    differences *= (sizes / (sizes - 1).clip(1))[seen, None] ** 0.5 / seen.sum() ** 0.5
    _, lengths, directions = np.linalg.svd(np.nan_to_num(differences), full_matrices=False)
    kept = lengths[:DIRECTIONS] > 1e-6 * lengths[0]
    return (lengths[:DIRECTIONS, None] * directions[:DIRECTIONS])[kept]
