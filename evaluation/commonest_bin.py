"""The control of masked expression modelling: what knowing the gene alone achieves."""

from typing import Any

import numpy as np


class CommonestBin:
    """
    Masked expression's control: every masked gene gets the bin it most often has where it is expressed.

    Examples
    --------
    >>> import scipy.sparse
    >>> train = scipy.sparse.csr_matrix(np.array([[2, 1, 0], [2, 3, 0], [1, 3, 0]]))
    >>> control = CommonestBin().fit(train)
    >>> control.bins.tolist(), control.accuracy(train)  # an unseen gene: the commonest of all
    ([2, 3, 1], 0.6666666666666666)
    """

    def fit(self, bins: Any) -> "CommonestBin":
        """Count expression ids of training cells, CSR [cells, genes]; of equal counts the lowest wins."""
        n_genes, n_bins = bins.shape[1], int(bins.data.max(initial=0)) + 1
        pairs = bins.indices.astype(np.int64) * n_bins + bins.data
        counts = np.bincount(pairs, minlength=n_genes * n_bins).reshape(n_genes, n_bins)
        # masked tokens are expressed ones: bin 0 is never the answer.
        counts[:, 0] = 0
        overall = int(counts.sum(axis=0).argmax())
        self.bins = np.where(counts.sum(axis=1) > 0, counts.argmax(axis=1), overall)
        return self

    def predict(self, gene_ids: np.ndarray) -> np.ndarray:
        """Bins of genes given by their place in the panel, any shape."""
        return self.bins[gene_ids]

    def accuracy(self, bins: Any) -> float:
        """Share of the expressed tokens of test cells, CSR [cells, genes], that it gets right; NaN of none."""
        expressed = bins.data > 0
        if not expressed.any():
            return float("nan")
        return float((self.bins[bins.indices[expressed]] == bins.data[expressed]).mean())
