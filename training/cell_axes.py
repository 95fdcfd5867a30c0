"""
Axes of cells that a corpus teaches without labels: what tells a cell from others, and not from its neighbours.

A linear discriminant analysis whose classes are neighbourhoods. Cells of one file are centered on their mean, so that
no axis tells studies apart; each cell is compared with the mean of its nearest neighbours in the same file, and what is
left of it, the scatter within a neighbourhood, is noise of sampling and depth as much as biology. The axes are those
in which cells differ the most in units of that scatter (Fisher 1936; as within-class covariance normalisation does for
speakers, Hatch et al. 2006). All is linear in the expression: one vector for a gene, and a cell is the sum of its
genes' vectors, each times its expression bin.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors import safe_open
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import randomized_svd

from ..tokenization import InputError, align_genes
from ..trained_model.model_folder import check_model_folder, find_model, load_tokenizer
from .principal_axes import Axes

WEIGHTS, TABLE = "model.safetensors", "embeddings.gene_embeddings.weight"
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
# a panel that shares fewer genes with pretrained vectors takes none
FEWEST_GENES = 50
# cells that tell how much of what differs lies along axes
COMPARED_CELLS = 500


@dataclass
class CellAxes:
    """
    A vector for every gene.

    Attributes
    ----------
    vectors
        float32 [genes, axes], the axis that tells the most first; zeros for genes that vary too little.
    center
        The vector of the mean cell of all files, float32 [axes].
    spread
        Variance of cells along each axis; that within a neighbourhood is 1, float64 [axes].
    """

    vectors: np.ndarray
    center: np.ndarray
    spread: np.ndarray


def cell_axes(
    files: Iterable[sp.csr_matrix] | Callable[[], Iterator[sp.csr_matrix]], n_axes: int
) -> CellAxes:
    """
    Axes of the cells of several files.

    Parameters
    ----------
    files
        Expression bins of each, [cells, genes], over one panel; a sequence, or a function that begins to read them
        anew (they are gone through twice). A gene that a file does not measure is 0 in all its cells.
    n_axes
        How many; fewer come back of few cells or genes.

    Returns
    -------
    CellAxes

    Raises
    ------
    ValueError
        If no file has `FEWEST_CELLS` cells.

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


def pretrained_vectors(model: str | Path, panel: Sequence[str]) -> np.ndarray | None:
    """
    Vectors of the genes of a panel by a pretrained model, [genes, hidden], zeros for those it does not know.

    Parameters
    ----------
    model
        With ``pooling="cell"``: a folder, a name on the Hub, or ``"scbert-mini"``, which ships.
    panel
        Gene symbols.

    Returns
    -------
    numpy.ndarray or None
        float32; None where fewer than `FEWEST_GENES` genes have a vector.

    Raises
    ------
    InputError
        If the model's gene table holds no axes of cells.
    """
    folder = find_model(model)
    if check_model_folder(folder).get("pooling") != "cell" or not (folder / WEIGHTS).is_file():
        raise InputError(
            f'{model} holds no axes of cells in its gene table; a model pretrained with pooling "cell" was needed, '
            f"such as scbert-mini, its weights in one file ({WEIGHTS})."
        )
    # the table alone: nothing else of the model is used
    with safe_open(folder / WEIGHTS, "pt") as weights:
        names = weights.keys()
        table = weights.get_tensor(next(name for name in names if name.endswith(TABLE))).float().numpy()
    places = align_genes(list(panel), load_tokenizer(folder).gene_panel).target
    vectors = np.where(places[:, None] >= 0, table[places], 0).astype(np.float32)
    return vectors if vectors.any(axis=1).sum() >= FEWEST_GENES else None


def axes_along(features: sp.csr_matrix, vectors: np.ndarray) -> Axes:
    """
    Coordinates of cells along axes that were found elsewhere.

    Parameters
    ----------
    features
        [cells, genes], and behind the genes what no vector is of.
    vectors
        Of the genes, [genes, axes].

    Examples
    --------
    >>> cells = sp.csr_matrix(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> axes_along(cells, np.array([[1.0], [0.0]])).coordinates.ravel().tolist()
    [-1.0, 1.0]
    """
    vectors = np.pad(vectors, ((0, features.shape[1] - len(vectors)), (0, 0)))
    center = np.asarray(features.mean(axis=0)).ravel()
    coordinates = (features @ vectors - center @ vectors).astype(np.float32)
    return Axes(coordinates, center, lambda coefficients: coefficients @ vectors.T)


def signal_along(bins: sp.csr_matrix, values: np.ndarray, vectors: np.ndarray) -> float:
    """
    Share of what differs between cells that lies along axes found elsewhere, the noise of counting left aside.

    The counts of every cell are thinned into two halves, whose noise is independent (count splitting, Neufeld et al.
    2024): what both halves tell of the same cell is no noise. High where the axes know cells of this kind.

    Parameters
    ----------
    bins
        Expression bins [cells, genes]; of more than `COMPARED_CELLS`, as many are drawn.
    values
        Expression that bins stand for, see `cell_targets.bin_values`; a cell's lowest is one count.
    vectors
        Of the genes, [genes, axes].

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
    expression = values[bins.data]
    lowest = [expression[start:stop].min(initial=np.inf) for start, stop in zip(bins.indptr, bins.indptr[1:])]
    counts = np.rint(expression / np.repeat(lowest, np.diff(bins.indptr))).astype(np.int64)
    first = rng.binomial(counts, 0.5)
    halves = [
        _centered(_log_cp10k(sp.csr_matrix((half, bins.indices, bins.indptr), shape=bins.shape)))
        for half in (first, counts - first)
    ]
    # axes need not be at right angles
    basis = np.linalg.qr(vectors)[0]
    along, everything = (
        float((one * other).sum()) for one, other in ([half @ basis for half in halves], halves)
    )
    return along / everything if everything > 0 else 0.0


def _log_cp10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    totals = np.maximum(np.asarray(counts.sum(axis=1)), 1)
    return counts.multiply(1e4 / totals).log1p().tocsr()


def _moments(cells: sp.csr_matrix) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of cells; mean and variance of every gene."""
    cells = cells.astype(np.float64)
    mean = np.asarray(cells.mean(axis=0)).ravel()
    return cells.shape[0], mean, np.asarray(cells.multiply(cells).mean(axis=0)).ravel() - mean**2


def _centered(cells: sp.csr_matrix, genes: np.ndarray | slice = slice(None)) -> np.ndarray:
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
