"""What a whole cell is predicted to be: expression of all genes that its file measures; and a cell seen less deeply."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from ..tokenization import InputError, ScBertTokenizer
from ..tokenization.expression_scbert import floor_values

# in the place of a gene that a cell's file does not measure
UNMEASURED = -100.0


def bin_values(tokenizer: ScBertTokenizer) -> np.ndarray:
    """
    Expression that the bins of a tokenizer stand for, float32 [bins], 0 for bin 0; see `floor_values`.

    An `InputError` if bins are quantiles of a cell, which have no values.

    Examples
    --------
    >>> bin_values(ScBertTokenizer(gene_panel=["CD3E"], n_bins=2)).round(2)
    array([0.  , 1.83, 4.66], dtype=float32)
    """
    if tokenizer.binning != "floor":
        raise InputError(
            f'Predicting whole cells needs bins that stand for expression: binning="floor" in the tokenizer, found '
            f'"{tokenizer.binning}". Change it, or leave cell_loss_weight and thinning out.'
        )
    return floor_values(tokenizer.n_bins, tokenizer.bin_width, tokenizer.log_base)


class CellTargets:
    """
    Expression of whole cells, as `whole_cell_loss` takes it, by the genes that each file measures, bool [files, genes].

    Examples
    --------
    >>> tokenizer = ScBertTokenizer(gene_panel=["CD3E", "MS4A1", "NKG7"])
    >>> targets = CellTargets(tokenizer, np.array([[True, True, False]]))
    >>> targets(sp.csr_matrix(np.array([[2, 0, 0]], dtype=np.int8)), np.array([0])).astype(int)
    array([[   4,    0, -100]])
    """

    def __init__(self, tokenizer: ScBertTokenizer, measured: np.ndarray):
        self.values = bin_values(tokenizer)
        self.measured = measured

    def __call__(self, bins: sp.csr_matrix, files: np.ndarray) -> np.ndarray:
        """Float32 [cells, genes] of bins [cells, genes] and the file of every cell [cells]."""
        dense = sp.csr_matrix((self.values[bins.data], bins.indices, bins.indptr), shape=bins.shape).toarray()
        dense[~self.measured[files]] = UNMEASURED
        return dense


def mean_cell(
    bin_counts: np.ndarray, values: np.ndarray, measured: np.ndarray, cells_per_file: np.ndarray
) -> np.ndarray:
    """
    Logarithm of the mean expression of every gene in the cells whose file measures it, float32 [genes].

    By how often each bin stands at each gene [genes, vocabulary], the `bin_values`, the genes that each file measures
    [files, genes] and the number of its cells. One cell with the mean of all genes is added, so that a gene that no
    cell expresses has a logarithm.

    Examples
    --------
    >>> mean_cell(np.array([[0, 4], [0, 0]]), np.array([0.0, 3.0]), np.array([[True, True]]), np.array([4])).round(2)
    array([ 0.99, -1.2 ], dtype=float32)
    """
    sums = bin_counts[:, : len(values)] @ values.astype(np.float64)
    n_cells = cells_per_file @ measured
    typical = (sums.sum() / max(1, n_cells.sum())) or 1.0
    return np.log((sums + typical) / (n_cells + 1)).astype(np.float32)


def thin_cells(
    bins: sp.csr_matrix, values: np.ndarray, largest: float, generators: Sequence[np.random.Generator]
) -> sp.csr_matrix:
    """
    Cells as shallower sequencing would have seen them: some of the genes with few counts are gone.

    Of every cell's counts a share from 0 to `largest` is taken away, as its generator decides. A gene is lost if all of
    its counts are; how many it has is told by its expression in units of the cell's lowest, which is one count. What
    stays of the bins [cells, genes] keeps its bin: on average, expression per 10,000 counts does not change.

    Examples
    --------
    >>> cells = sp.csr_matrix(np.full((1, 1000), 1, dtype=np.int8))
    >>> thin_cells(cells, np.array([0.0, 1.0]), 0.5, [np.random.default_rng(0)]).nnz
    711
    """
    kept = []
    for generator, start, stop in zip(generators, bins.indptr[:-1], bins.indptr[1:], strict=True):
        expression = values[bins.data[start:stop]]
        lost = largest * generator.random()
        counts = expression / expression.min(initial=np.inf)
        kept.append(generator.random(stop - start) >= lost**counts)
    kept = np.concatenate(kept)
    ends = np.concatenate([[0], np.cumsum(kept)])[bins.indptr]
    return sp.csr_matrix((bins.data[kept], bins.indices[kept], ends), shape=bins.shape)
