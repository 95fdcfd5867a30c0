"""Binned cells as a torch data set: sparse rows that a collator makes dense, one batch at a time."""

import numpy as np
import scipy.sparse as sp
from torch.utils.data import Dataset


class CellDataset(Dataset):
    """Rows of binned cells, with labels if there are any.

    Parameters
    ----------
    bins : scipy.sparse.csr_matrix [cells, panel]
        What `ScBertTokenizer.bin_cells` returns.
    labels : sequence of int [cells], optional
        Class ids.
    rows : sequence of int, optional
        Cells to take, in this order; all of them if left out.

    Examples
    --------
    >>> dataset = CellDataset(sp.csr_matrix(np.array([[0, 2, 1], [3, 0, 0]], dtype=np.int8)), labels=[1, 0])
    >>> dataset[0]
    {'row': {'indices': array([1, 2], dtype=int32), 'values': array([2, 1], dtype=int8)}, 'labels': 1}
    """

    def __init__(self, bins, labels=None, rows=None):
        if not sp.issparse(bins) or bins.format != "csr":
            raise TypeError("bins must be a CSR matrix, as ScBertTokenizer.bin_cells returns it")
        self.bins = bins
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.rows = np.arange(bins.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        if self.labels is not None and len(self.labels) != bins.shape[0]:
            raise ValueError(f"{len(self.labels)} labels for {bins.shape[0]} cells")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        start, stop = self.bins.indptr[row], self.bins.indptr[row + 1]
        item = {"row": {"indices": self.bins.indices[start:stop], "values": self.bins.data[start:stop]}}
        if self.labels is not None:
            item["labels"] = int(self.labels[row])
        return item

    @property
    def lengths(self):
        """Expressed genes of each cell, for sampling cells of like length together."""
        return np.diff(self.bins.indptr)[self.rows]

    def subset(self, rows):
        """The cells at positions `rows` of this data set, sharing its memory."""
        return CellDataset(self.bins, self.labels, self.rows[np.asarray(rows, dtype=np.int64)])


def stack_rows(items, n_genes):
    """Rows of `CellDataset` items as one CSR matrix, for `ScBertTokenizer.encode_bins`.

    Parameters
    ----------
    items : sequence of dict
        What `CellDataset.__getitem__` returns.
    n_genes : int
        Size of the panel.

    Returns
    -------
    scipy.sparse.csr_matrix [items, n_genes]
    """
    rows = [item["row"] for item in items]
    indptr = np.cumsum([0, *(len(row["indices"]) for row in rows)])
    indices = np.concatenate([row["indices"] for row in rows])
    values = np.concatenate([row["values"] for row in rows])
    return sp.csr_matrix((values, indices, indptr), shape=(len(rows), n_genes))
