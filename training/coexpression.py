"""Pairs of co-expressed genes: Pearson correlation over sparse cells, block by block."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..tokenization import InputError

# 0.5 GiB of float32 correlations at a time: 20,000 genes stay far below 4 GiB in all
BLOCK_BYTES = 2**29
CELLS_AT_ONCE = 1024
ROWS_AT_ONCE = 512
MOST_PAIRS = 50_000_000
CUTOFFS = np.round(np.arange(0.1, 1.0, 0.1), 1)


@dataclass
class GenePairs:
    """
    Co-expressed pairs of one dataset or of several joined together.

    Pairs are positions in the list of genes, int32 [n_pairs, 2], one for each dataset that supports it, with Pearson
    correlations, float32 [n_pairs]. `pairs_above` counts those that exceed each of a ladder of cutoffs, chosen or not.
    """

    genes: list[str]
    pairs: np.ndarray
    correlations: np.ndarray
    pairs_above: dict[float, int] = field(default_factory=dict)


def coexpressed_pairs(
    expression,
    gene_names,
    cutoff: float | None = 0.9,
    top_pairs: int | None = None,
    min_cells: int = 20,
    progress: Callable[[int], Any] = lambda n_genes: None,
) -> GenePairs:
    """Find the gene pairs whose expression correlates across the cells of one dataset.

    Genes seen in fewer than `min_cells` cells are left out first: two genes that share their only
    cell correlate perfectly and mean nothing. Of log-normalised expression [cells, genes], pairs are kept whose
    correlation is the cutoff at least (0.9 in the gene2vec paper, whose samples are bulk tissues; single cells
    correlate far less), and of these only the strongest `top_pairs`. They come in order of gene position. `progress` is
    told how many genes were finished since it was last called.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> base = np.arange(30.0)[:, None]
    >>> cells = sp.csr_matrix(np.hstack([base, 2 * base, np.cos(base)]))
    >>> found = coexpressed_pairs(cells, ["A", "B", "C"], cutoff=0.9)
    >>> [(found.genes[i], found.genes[j]) for i, j in found.pairs]
    [('A', 'B')]
    """
    if cutoff is None and top_pairs is None:
        raise InputError("Neither a correlation cutoff nor a number of pairs is given; give one of them.")
    expression = sp.csc_matrix(expression, dtype=np.float32)
    names = np.asarray(gene_names, dtype=object)
    kept, mean, deviation = _usable_genes(expression, min_cells)
    expression = expression[:, kept].tocsr()
    selection = _PairSelection(cutoff, top_pairs)
    rows_per_block = max(1, BLOCK_BYTES // (4 * max(1, len(kept))))
    for start in range(0, len(kept), rows_per_block):
        stop = min(start + rows_per_block, len(kept))
        block = _correlation_block(expression, mean[kept], deviation[kept], start, stop)
        for row in range(0, stop - start, ROWS_AT_ONCE):
            selection.add(block[row : row + ROWS_AT_ONCE], start + row, start)
        progress(stop - start)
    selection.keep_strongest()
    counts = dict(zip(CUTOFFS.tolist(), selection.counts.tolist()))
    return GenePairs(list(names[kept]), *selection.parts[0], counts)


def join_pairs(parts) -> GenePairs:
    """Join the pairs of several datasets by gene name, keeping repeats.

    A pair supported by two datasets stands twice, so that word2vec sees it twice as often.

    Examples
    --------
    >>> import numpy as np
    >>> one = GenePairs(["A", "B"], np.array([[0, 1]]), np.ones(1))
    >>> two = GenePairs(["B", "C"], np.array([[0, 1]]), np.ones(1))
    >>> join_pairs([one, two]).pairs.tolist()
    [[0, 1], [1, 2]]
    """
    position: dict[str, int] = {}
    pairs, correlations, above = [], [], Counter()
    for part in parts:
        ids = np.array([position.setdefault(gene, len(position)) for gene in part.genes], dtype=np.int32)
        pairs.append(ids[part.pairs])
        correlations.append(part.correlations)
        above.update(part.pairs_above)
    return GenePairs(list(position), np.concatenate(pairs), np.concatenate(correlations), above)


def _usable_genes(expression, min_cells: int):
    """Columns expressed in enough cells and not constant, with every column's mean and deviation."""
    cells = max(1, expression.shape[0])
    mean = np.asarray(expression.sum(axis=0, dtype=np.float64)).ravel() / cells
    square = np.asarray(expression.multiply(expression).sum(axis=0, dtype=np.float64)).ravel() / cells
    deviation = np.sqrt(np.clip(square - mean**2, 0.0, None))
    seen = np.asarray((expression != 0).sum(axis=0)).ravel()
    kept = np.flatnonzero((seen >= min_cells) & (deviation > 1e-6))
    return kept, mean.astype(np.float32), deviation.astype(np.float32)


def _correlation_block(expression, mean, deviation, start: int, stop: int) -> np.ndarray:
    """Correlations of genes start..stop with genes start..end: [stop - start, genes - start]."""
    block = np.zeros((stop - start, expression.shape[1] - start), dtype=np.float32)
    product = np.empty_like(block)
    columns = expression[:, start:] if start else expression
    for first in range(0, expression.shape[0], CELLS_AT_ONCE):
        # at one gene in ten expressed a dense product beats a sparse one; the cells are few at a time
        cells = columns[first : first + CELLS_AT_ONCE].toarray()
        cells -= mean[start:]
        cells /= deviation[start:]
        np.matmul(cells[:, : stop - start].T, cells, out=product)
        block += product
    block /= expression.shape[0]
    return block


class _PairSelection:
    """Pairs above a cutoff and among the strongest so far, in bounded memory."""

    def __init__(self, cutoff: float | None, top_pairs: int | None):
        self.threshold = -1.0 if cutoff is None else cutoff
        self.top_pairs = top_pairs
        self.counts = np.zeros(len(CUTOFFS), dtype=np.int64)
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.held = 0

    def add(self, rows: np.ndarray, first_row: int, first_column: int) -> None:
        # only the upper triangle, without the diagonal
        rows[np.tril_indices(len(rows), first_row - first_column, rows.shape[1])] = -2.0
        for index, level in enumerate(CUTOFFS):
            above = np.count_nonzero(rows >= level)
            self.counts[index] += above
            if not above:
                break
        i, j = np.nonzero(rows >= self.threshold)
        pairs = np.column_stack([i + first_row, j + first_column]).astype(np.int32)
        self.parts.append((pairs, rows[i, j]))
        self.held += len(pairs)
        if self.top_pairs is not None and self.held > 2 * self.top_pairs:
            self.keep_strongest()
        if self.held > MOST_PAIRS:
            raise InputError(
                f"More than {MOST_PAIRS:,} gene pairs correlate at {self.threshold} or more, too many to hold: "
                "raise the cutoff, or keep the strongest only with --top-pairs."
            )

    def keep_strongest(self) -> None:
        """Make one part of all, with the strongest pairs alone."""
        # one empty part, so that there is something to join where no gene is left
        parts = self.parts or [(np.empty((0, 2), np.int32), np.empty(0, np.float32))]
        pairs, values = (np.concatenate(arrays) for arrays in zip(*parts))
        if self.top_pairs is not None and len(values) > self.top_pairs:
            # a stable order makes ties, and so the whole training, reproducible
            kept = np.sort(np.argsort(-values, kind="stable")[: self.top_pairs])
            pairs, values = pairs[kept], values[kept]
            self.threshold = max(self.threshold, float(values.min()))
        self.parts, self.held = [(pairs, values)], len(values)
