"""
Axes of cells that a corpus teaches without labels: what tells a cell from others, and not from its neighbours.

A linear discriminant analysis whose classes are neighbourhoods. Cells of one file are centered on their mean, so that
no axis tells studies apart; each cell is compared with the mean of its nearest neighbours in the same file, and what is
left of it, the scatter within a neighbourhood, is noise of sampling and depth as much as biology. The axes are those
in which cells differ the most in units of that scatter (Fisher 1936; as within-class covariance normalisation does for
speakers, Hatch et al. 2006). All is linear in the expression: one vector for a gene, and a cell is the sum of its
genes' vectors, each times its expression bin.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import randomized_svd

# genes that axes are made of, by variance within the files; the others have no vector
VARIABLE_GENES = 4000
# axes of the pooled cells, among which the discriminating ones are looked for
POOLED_AXES = 200
# of a file's own cells: axes that neighbours are looked for in, neighbours, and their largest share of the cells
NEIGHBOUR_AXES, NEIGHBOURS, MOST_NEIGHBOURS = 30, 15, 1 / 8
# a file counts by this power of its number of cells: large ones more, but not by as much
FILE_POWER = 0.5
# share of an even scatter in that within neighbourhoods: axes of hardly any scatter are not to be trusted
SHRINKAGE = 0.1
# a file needs so many cells, or there is no neighbourhood
FEWEST_CELLS = 50


@dataclass
class CellAxes:
    """
    A vector for every gene, float32 [genes, axes], the axis that tells the most first; zeros for genes that vary too
    little. The center is the vector of the mean cell of all files, [axes]; the spread, the variance of cells along each
    axis [axes], where that within a neighbourhood is 1.
    """

    vectors: np.ndarray
    center: np.ndarray
    spread: np.ndarray


def cell_axes(
    files: Iterable[sp.csr_matrix] | Callable[[], Iterator[sp.csr_matrix]], n_axes: int
) -> CellAxes:
    """
    Axes of the cells of several files.

    Each file is its expression bins [cells, genes] over one panel, 0 for a gene that it does not measure. Given is a
    sequence of them, or a function that begins to read them anew (they are gone through twice). Few cells or genes have
    fewer axes than `n_axes`; without a file of `FEWEST_CELLS` cells there are none, a ValueError.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rates = 1 + 4 * np.eye(3)[np.arange(300) % 3] @ np.eye(3, 20)
    >>> files = [sp.csr_matrix(rng.poisson(rates).astype(np.float32)) for _ in range(2)]
    >>> axes = cell_axes(files, 2)
    >>> axes.vectors.shape, bool((abs(axes.vectors[:3]).min(axis=0) > abs(axes.vectors[3:]).mean(axis=0)).any())
    ((20, 2), True)
    """
    again = files if callable(files) else lambda: iter(files)
    parts = [_moments(cells) for cells in again() if cells.shape[0] >= FEWEST_CELLS]
    if not parts:
        raise ValueError(f"Axes of cells need a file of {FEWEST_CELLS} cells or more.")
    weights = np.array([n for n, *_ in parts]) ** FILE_POWER
    weights /= weights.sum()
    variance = sum(w * v for w, (_, _, v) in zip(weights, parts))
    kept = np.sort(np.argsort(-variance, kind="stable")[:VARIABLE_GENES])
    kept = kept[variance[kept] > 0]
    usable = (_centered(cells, kept) for cells in again() if cells.shape[0] >= FEWEST_CELLS)
    total, within = np.zeros((2, len(kept), len(kept)), dtype=np.float32)
    for weight, cells in zip(weights, usable):
        residual = cells - _means_of_neighbours(cells)
        total += weight / len(cells) * (cells.T @ cells)
        within += weight / len(cells) * (residual.T @ residual)
    loadings, spread = _discriminating(total, within, n_axes)
    vectors = np.zeros((len(variance), len(spread)), dtype=np.float32)
    vectors[kept] = loadings
    mean = sum(w * m for w, (_, m, _) in zip(weights, parts))
    return CellAxes(vectors, (mean @ vectors).astype(np.float32), spread)


def _moments(cells: sp.csr_matrix) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of cells; mean and variance of every gene."""
    cells = cells.astype(np.float64)
    mean = np.asarray(cells.mean(axis=0)).ravel()
    return cells.shape[0], mean, np.asarray(cells.multiply(cells).mean(axis=0)).ravel() - mean**2


def _centered(cells: sp.csr_matrix, genes: np.ndarray) -> np.ndarray:
    dense = cells[:, genes].toarray().astype(np.float32)
    return dense - dense.mean(axis=0)


def _means_of_neighbours(cells: np.ndarray) -> np.ndarray:
    """Of every cell's nearest neighbours, without itself, [cells, genes]."""
    left, values, _ = randomized_svd(cells, min(NEIGHBOUR_AXES, *cells.shape), n_iter=2, random_state=0)
    n_neighbours = min(NEIGHBOURS, int(len(cells) * MOST_NEIGHBOURS))
    graph = NearestNeighbors(n_neighbors=n_neighbours).fit(left * values).kneighbors_graph()
    return (graph.astype(np.float32) / n_neighbours) @ cells


def _discriminating(total: np.ndarray, within: np.ndarray, n_axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Loadings [genes, axes] with unit scatter within, in order of the variance of all cells [axes]."""
    pooled, _, _ = randomized_svd(total, min(POOLED_AXES, len(total)), n_iter=2, random_state=0)
    inside, everything = (pooled.T @ part @ pooled for part in (within, total))
    inside = inside.astype(np.float64)
    even = np.trace(inside) / len(inside)
    values, vectors = np.linalg.eigh((1 - SHRINKAGE) * inside + SHRINKAGE * even * np.eye(len(inside)))
    whitener = vectors / np.sqrt(values)
    spread, rotation = np.linalg.eigh(whitener.T @ everything @ whitener)
    order = np.argsort(-spread)[:n_axes]
    loadings = pooled @ whitener @ rotation[:, order]
    # the sign of an axis is anyone's: the gene that counts the most is positive
    loadings *= np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(len(order))])
    return loadings.astype(np.float32), spread[order]
