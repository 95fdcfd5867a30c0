"""The baseline of masked expression modelling: what knowing the gene alone achieves."""

from typing import Any

import numpy as np


class PerGeneModeBaseline:
    """
    Predicts every gene's commonest bin of the training cells, whatever the cell.

    Made of `count_bins`' output [genes, vocabulary]. `mode` [genes] is the commonest bin of every gene, of equal ones
    that which all genes have more often; a gene the training cells never express gets the commonest bin of all genes.
    Its probabilities (for a cross-entropy) are the gene's shares of bins, after adding the shares of all genes as one
    pseudo-count: `log_shares` are their natural logarithms, float32 [genes, vocabulary].
    """

    def __init__(self, bin_counts: np.ndarray):
        overall = bin_counts.sum(axis=0) / max(1, bin_counts.sum())
        smooth = bin_counts + overall
        self.mode = smooth.argmax(axis=1)
        shares = smooth / np.maximum(smooth.sum(axis=1, keepdims=True), 1e-12)
        self.log_shares = np.log(np.maximum(shares, 1e-12)).astype(np.float32)


def count_bins(bins: Any, vocab_size: int) -> np.ndarray:
    """
    How often each expression id stands at each gene of CSR bins [cells, genes], int64 [genes, vocab_size].

    Zeros are not stored and not counted (column 0 is 0), as they are never asked for.
    """
    n_genes = bins.shape[1]
    flat = bins.indices.astype(np.int64) * vocab_size + bins.data
    return np.bincount(flat, minlength=n_genes * vocab_size).reshape(n_genes, vocab_size)
