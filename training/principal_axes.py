"""
Axes of cells: few principal ones in which ridge regression is as on all genes, or nearly; or such as are given.

The mean expression of a type scatters over studies (people, protocols, chemistries) along a few directions of the
genes. A regression that leans on them fails on the next study, and held-out cells of its own study cannot tell.
Where such batch effects are known, features are damped along them first, which is the same as to penalise weights
along them more than others (within-class covariance normalisation, Hatch et al. 2006, with studies of a type in the
place of sessions of a speaker).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh
from sklearn.utils.extmath import randomized_svd

# up to so many cells every axis is kept, and ridge regression is exactly that on the genes; beyond, the largest
FULL_RANK = 1000
RANK = 400
# of more than these, fewer: a fit's time grows with both
MANY_CELLS, RANK_OF_MANY = 4000, 256
# beyond so many cells, axes come from the covariance of the most variable genes and not from the cells' inner products
MAX_CELLS_BY_CELLS = 10_000
COVARIANCE_GENES = 8000
# as they do where there are so many times more cells than genes: the covariance is the smaller matrix
FEW_GENES = 2
# eigenpairs are found directly where more than one in so many is wanted
DIRECT_SHARE = 8
# columns with entries in a larger share of the rows are multiplied dense
DENSE_SHARE = 0.03
# eigenvalues of float32 products are noise below
SMALLEST_EIGENVALUE = 1e-5
# by how much a direction is damped, for its scatter between studies in units of that of cells
STRENGTH = 200.0
# cells that tell how much of what differs lies along given axes
COMPARED_CELLS = 500
# how often fewer cells are thinned at the most; axes shorter than this share of the longest are rounding
MOST_THINNINGS, SMALLEST_AXIS = 10, 3e-3
# values that are summed together in double precision
SUMMED_VALUES = 1 << 24


@dataclass
class Axes:
    """
    Coordinates of cells along axes, float32 [cells, rank], and the way back to weights of genes.

    The largest principal axis comes first; cells that the axes are not of have coordinates as well. The center is the
    mean of the features of those that they are of, [genes]; `to_genes` makes weights [n, genes] of coefficients
    [n, rank].
    """

    coordinates: np.ndarray
    center: np.ndarray
    to_genes: Callable[[np.ndarray], np.ndarray]

    def gene_weights(self, coefficients: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [n, genes] and bias [n] that give on the features what these give on the coordinates."""
        weights = self.to_genes(coefficients)
        return weights, bias - weights @ self.center

    def first(self, rank: int) -> "Axes":
        """The largest of these, at most so many."""
        coordinates = self.coordinates[:, :rank]
        others = self.coordinates.shape[1] - coordinates.shape[1]

        def to_genes(coefficients):
            return self.to_genes(np.pad(coefficients, ((0, 0), (0, others))))

        return Axes(coordinates, self.center, to_genes)

    def widened(self, genes: np.ndarray, scales: np.ndarray) -> "Axes":
        """The same axes on all genes [genes], where these are of some `genes` that were multiplied by `scales`."""
        center = np.zeros(len(scales))
        # what was scaled for the axes is scaled in the weights: the center is that of the features as they are
        center[genes] = self.center / scales[genes]

        def to_genes(coefficients):
            weights = np.zeros((len(coefficients), len(scales)))
            weights[:, genes] = self.to_genes(coefficients) * scales[genes]
            return weights

        return Axes(self.coordinates, center, to_genes)


@dataclass
class Damping:
    """
    The matrix (1 + E'E / s)^(-1/2) [genes, genes], for effects E [n, genes] and the cells' mean squared norm s.

    Its directions are at right angles, of length 1, [n, genes]; features lose from 0 to 1 along each, [n].
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
    center = column_means(features)
    # of cells that are all alike, rounding may leave less than nothing
    return max(float(column_means(features, power=2).sum() - center @ center), 1e-9)


def column_means(rows: sp.csr_matrix, power: int = 1) -> np.ndarray:
    """
    Means of the columns, or of a power of their values, float64 [columns].

    The sums are taken in double precision (in float32 those over millions of rows lose digits), without a copy of all
    values.

    Examples
    --------
    >>> column_means(sp.csr_matrix(np.array([[1.0, 0.0], [2.0, 4.0]])), power=2).tolist()
    [2.5, 8.0]
    """
    total = np.zeros(rows.shape[1])
    for start in range(0, rows.nnz, SUMMED_VALUES):
        part = slice(start, min(start + SUMMED_VALUES, rows.nnz))
        total += np.bincount(rows.indices[part], rows.data[part].astype(np.float64) ** power, len(total))
    return total / rows.shape[0]


def in_units_of(features: sp.csr_matrix, effects: np.ndarray) -> np.ndarray:
    """Effects [n, genes], in units of the cells' scatter, for features [cells, genes and more]; with their strength."""
    wide = np.pad(effects, ((0, 0), (0, features.shape[1] - effects.shape[1])))
    return wide * (STRENGTH * mean_squared_norm(features)) ** 0.5


def axes_of_cells(
    features: sp.csr_matrix,
    learnt: np.ndarray | None = None,
    rank: int | None = None,
    effects: np.ndarray | None = None,
) -> Axes:
    """
    Principal axes of cells [cells, genes]: of those `learnt` from, bool [cells], or all.

    By default the rank is their number up to `FULL_RANK`, and `RANK` of more. The features are damped along the
    effects, in their units, [n, genes]; see `Damping`.

    Examples
    --------
    >>> cells = sp.csr_matrix(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]], dtype=np.float32))
    >>> axes_of_cells(cells).coordinates.shape
    (3, 1)
    """
    learnt = np.ones(features.shape[0], dtype=bool) if learnt is None else learnt
    if features.shape[0] > min(MAX_CELLS_BY_CELLS, FEW_GENES * features.shape[1]):
        return _axes_by_genes(features, learnt, rank, effects)
    products, damping = _damped_products(features, effects)
    return axes_by_products(products, features, learnt, rank, damping)


def axes_and_products(
    features: sp.csr_matrix, effects: np.ndarray | None = None, learnt: np.ndarray | None = None
) -> tuple[Axes, np.ndarray | None]:
    """`axes_of_cells`, and the inner products of all cells [cells, cells] if there are few enough to take them."""
    if features.shape[0] > MAX_CELLS_BY_CELLS:
        return axes_of_cells(features, learnt, effects=effects), None
    learnt = np.ones(features.shape[0], dtype=bool) if learnt is None else learnt
    products, damping = _damped_products(features, effects)
    return axes_by_products(products, features, learnt, damping=damping), products


def _damped_products(features, effects) -> tuple[np.ndarray, Damping | None]:
    products = inner_products(features)
    if effects is None:
        return products, None
    damping = Damping.of(effects, features)
    return products - damping.products(features), damping


def axes_along(features: sp.csr_matrix, vectors: np.ndarray) -> Axes:
    """
    Coordinates of cells along axes that were found elsewhere, by the vectors of the genes [genes, axes].

    The features [cells, genes] may have more behind the genes, which no vector is of.

    Examples
    --------
    >>> cells = sp.csr_matrix(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> axes_along(cells, np.array([[1.0], [0.0]])).coordinates.ravel().tolist()
    [-1.0, 1.0]
    """
    vectors = np.pad(vectors, ((0, features.shape[1] - len(vectors)), (0, 0)))
    center = column_means(features)
    coordinates = (features @ vectors - center @ vectors).astype(np.float32)
    return Axes(coordinates, center, lambda coefficients: coefficients @ vectors.T)


def signal_along(bins: sp.csr_matrix, values: np.ndarray, vectors: np.ndarray) -> float:
    """
    Share of what differs between cells that lies along axes found elsewhere, the noise of counting left aside.

    The counts of every cell are thinned into two halves, whose noise is independent (count splitting, Neufeld et al.
    2024): what both halves tell of the same cell is no noise. High where the axes know cells of this kind; 0 where the
    cells do not differ by more than the noise. By expression bins [cells, genes], of which at most `COMPARED_CELLS` are
    drawn, the values they stand for (see `expression_scbert.floor_values`; a cell's lowest is one count), and the
    vectors of the genes [genes, axes].

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> bins = rng.poisson(np.repeat([[9, 9, 1, 1], [1, 1, 9, 9]], 50, axis=0))
    >>> known, foreign = np.array([[1.0], [1], [-1], [-1]]), np.array([[1.0], [-1], [0], [0]])
    >>> [signal_along(sp.csr_matrix(bins), np.arange(30.0), vectors) > 0.8 for vectors in (known, foreign)]
    [True, False]
    """
    rng = np.random.default_rng(0)
    bins = bins[np.sort(rng.permutation(bins.shape[0])[:COMPARED_CELLS])].tocsr()
    expression = np.asarray(values, dtype=np.float64)[bins.data]
    lowest = [expression[start:stop].min(initial=np.inf) for start, stop in zip(bins.indptr, bins.indptr[1:])]
    counts = np.rint(expression / np.repeat(lowest, np.diff(bins.indptr))).astype(np.int64)
    # axes need not be at right angles, nor differ all
    basis, lengths, _ = np.linalg.svd(vectors, full_matrices=False)
    basis = basis[:, lengths > SMALLEST_AXIS * lengths[0]]
    found = np.zeros((2, bins.shape[0]))
    # few cells are thinned often: one thinning of them says little
    n_thinnings = int(np.clip(COMPARED_CELLS // max(1, bins.shape[0]), 1, MOST_THINNINGS))
    for _ in range(n_thinnings):
        first = rng.binomial(counts, 0.5)
        halves = [
            _log_cp10k(sp.csr_matrix((half, bins.indices, bins.indptr), shape=bins.shape))
            for half in (first, counts - first)
        ]
        found += [_products_of_centered(*(half @ basis for half in halves)), _products_of_centered(*halves)]
    along, everything = found / n_thinnings
    error = everything.std() / len(everything) ** 0.5
    # cells that do not differ by more than the noise tell nothing
    if everything.mean() <= max(0, 2 * error):
        return 0.0
    return float(np.clip(along.mean() / everything.mean(), 0, 1))


def _log_cp10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    totals = np.maximum(np.asarray(counts.sum(axis=1)), 1)
    return counts.multiply(1e4 / totals).log1p().tocsr()


def _products_of_centered(first, second) -> np.ndarray:
    """Inner product of each row with the same row of the other, both less their mean row; float64 [rows]."""
    means = [np.asarray(rows.mean(axis=0)).ravel() for rows in (first, second)]
    both = first.multiply(second) if sp.issparse(first) else first * second
    own = np.asarray(both.sum(axis=1)).ravel()
    return own - first @ means[1] - second @ means[0] + means[0] @ means[1]


def axes_by_products(
    products: np.ndarray,
    features: sp.csr_matrix,
    learnt: np.ndarray,
    rank: int | None = None,
    damping: Damping | None = None,
) -> Axes:
    """As `axes_of_cells`, by the inner products of all cells, [cells, cells], which are of damped features."""
    inner = products[np.ix_(learnt, learnt)]
    means = inner.mean(axis=0)
    values, vectors = _largest_eigenpairs(inner - means - means[:, None] + means.mean(), rank, len(inner))
    basis, rows = vectors / np.sqrt(values), features[learnt]
    outer = products[:, learnt]
    centered = outer - outer.mean(axis=1, keepdims=True) - means + means.mean()

    def to_genes(coefficients):
        of_cells = basis @ coefficients.T
        # the vectors are orthogonal to a constant but for rounding, which small eigenvalues would enlarge
        weights = np.asarray((rows.T @ (of_cells - of_cells.mean(axis=0))).T)
        # once for the damped cells that the axes are sums of, once for the cells they are asked of
        return weights if damping is None else damping.weights(damping.weights(weights))

    return Axes((centered @ basis).astype(np.float32), column_means(rows), to_genes)


def most_variable(rows: sp.csr_matrix, n_genes: int) -> np.ndarray:
    """Columns whose values vary the most, in their order; of equal ones the first."""
    variance = column_means(rows, power=2) - column_means(rows) ** 2
    return np.sort(np.argsort(-variance, kind="stable")[:n_genes])


def _axes_by_genes(features, learnt, rank, effects) -> Axes:
    rows = features[learnt]
    center, kept = column_means(rows), most_variable(rows, COVARIANCE_GENES)
    # of large matrices, single precision will do
    middle = center[kept].astype(np.float32)
    scatter = inner_products(rows[:, kept].T.tocsr()) - rows.shape[0] * np.outer(middle, middle)
    damping = None if effects is None else Damping.of(effects[:, kept], rows[:, kept])
    if damping is not None:
        scatter = damping.weights(damping.weights(scatter).T)
    _, vectors = _largest_eigenpairs(scatter.astype(np.float32), rank, rows.shape[0])
    if damping is not None:
        vectors = damping.weights(vectors.T).T

    def to_genes(coefficients):
        weights = np.zeros((len(coefficients), features.shape[1]))
        weights[:, kept] = coefficients @ vectors.T
        return weights

    coordinates = features[:, kept] @ vectors - middle @ vectors
    return Axes(coordinates.astype(np.float32), center, to_genes)


def inner_products(rows: sp.csr_matrix, width: int = 2048) -> np.ndarray:
    """
    Inner products of all rows, float32 [rows, rows].

    Columns with many entries are taken dense, in blocks, which BLAS is fast on; of the others, most of the columns and
    few of the products, the sparse product is.
    """
    columns = rows.tocsc()
    counts = np.diff(columns.indptr)
    order = np.argsort(-counts, kind="stable")[: (counts > 0).sum()]
    n_dense = int((counts > DENSE_SHARE * rows.shape[0]).sum())
    total = np.zeros((rows.shape[0],) * 2, dtype=np.float32)
    for start in range(0, n_dense, width):
        block = columns[:, order[start : min(start + width, n_dense)]].toarray()
        block = block.astype(np.float32, copy=False)
        total += block @ block.T
    rare = columns[:, order[n_dense:]].tocsr()
    products = (rare @ rare.T).tocoo()
    total[products.row, products.col] += products.data
    return total


def _largest_eigenpairs(
    symmetric: np.ndarray, rank: int | None, n_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors of a positive semidefinite matrix, the largest first."""
    if rank is None:
        rank = RANK_OF_MANY if n_cells > MANY_CELLS else RANK if n_cells > FULL_RANK else n_cells
    rank = min(rank, len(symmetric))
    if rank * DIRECT_SHARE >= len(symmetric):
        # of a good part of all pairs, the direct way is the cheaper one
        values, vectors = eigh(symmetric, subset_by_index=[len(symmetric) - rank, len(symmetric) - 1])
        values, vectors = values[::-1], vectors[:, ::-1]
    else:
        vectors, values, _ = randomized_svd(symmetric, rank, n_iter=2, random_state=0)
    kept = values > SMALLEST_EIGENVALUE * values.max(initial=1e-30)
    return values[kept], vectors[:, kept]
