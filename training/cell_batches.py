"""Binned cells to dense batches: data sets that give a batch's rows at once, collators that make tensors of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..modeling_scbert.packing_scbert import pack
from ..tokenization import ScBertTokenizer
from .cell_targets import CellTargets, bin_values, thin_cells


class CellDataset(Dataset):
    """
    Binned cells whose rows are taken a batch at a time.

    The index ``epoch * len(cells) + i`` asks for cell ``i``, too: it numbers the visits to the cells, and decides by
    itself what is random about one. Bins are CSR [cells, panel], or what is indexed like it, such as
    `data.streaming.BinnedCells`; `rows` are the cells to take, in this order, and `files` says which file each cell of
    the bins comes from.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> cells = CellDataset(sp.csr_matrix(np.array([[0, 2, 1], [3, 0, 0]], dtype=np.int8)), labels=[1, 0])
    >>> batch = cells.__getitems__([3, 0])
    >>> batch["bins"].toarray().tolist(), batch["labels"].tolist(), batch["indices"].tolist()
    ([[3, 0, 0], [0, 2, 1]], [0, 1], [3, 0])
    """

    def __init__(
        self,
        bins: Any,
        labels: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        files: np.ndarray | None = None,
    ):
        self.bins, self.files = bins, files
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.rows = np.arange(bins.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        if self.labels is not None and len(self.labels) != bins.shape[0]:
            raise ValueError(f"{len(self.labels)} labels for {bins.shape[0]} cells")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        # torch's DataLoader asks for a whole batch by this name
        indices = np.asarray(indices, dtype=np.int64)
        rows = self.rows[indices % len(self)]
        batch = {"bins": self.bins[rows], "indices": indices}
        more = {"labels": self.labels, "files": self.files}
        return batch | {name: values[rows] for name, values in more.items() if values is not None}


class DataCollatorForCells:
    """
    Batches of `CellDataset` as tensors: what the tokenizer says of the cells, and their labels.

    Examples
    --------
    >>> from scbert import ScBertTokenizer
    >>> import scipy.sparse as sp
    >>> cells = CellDataset(sp.csr_matrix(np.array([[0, 2], [3, 1]], dtype=np.int8)), labels=[1, 0])
    >>> collator = DataCollatorForCells(ScBertTokenizer(gene_panel=["CD3E", "MS4A1"]))
    >>> collator(cells.__getitems__([0, 1]))["input_ids"]
    tensor([[0, 2, 0],
            [3, 1, 0]])
    """

    def __init__(self, tokenizer: ScBertTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        arrays = self.tokenizer.encode_bins(batch["bins"])
        if "labels" in batch:
            arrays["labels"] = batch["labels"]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class DataCollatorForMaskedExpression:
    """
    Batches for masked expression modelling: some expressed genes of each cell are hidden and asked for.

    Seed and index of a cell alone decide its mask, whatever batch, worker or process it falls into. With `packing` the
    cells of a batch come one after another in one row, without padding (see `packing_scbert.pack`), with the masks of
    the padded batch; nothing changes where every cell has every gene. `targets` gives ``cell_targets`` of the cells as
    they were before anything was hidden; `thinning` is the share of their counts taken away before, see `thin_cells`.

    Examples
    --------
    >>> from scbert import ScBertTokenizer
    >>> import scipy.sparse as sp
    >>> cells = CellDataset(sp.csr_matrix(np.array([[0, 2], [3, 1]], dtype=np.int8)))
    >>> collator = DataCollatorForMaskedExpression(ScBertTokenizer(gene_panel=["CD3E", "MS4A1"]))
    >>> (collator(cells.__getitems__([0, 1]))["labels"] != -100).sum(dim=1)
    tensor([1, 1])
    """

    def __init__(
        self,
        tokenizer: ScBertTokenizer,
        mlm_probability: float = 0.15,
        replace_probability: float = 0.9,
        seed: int = 0,
        packing: bool = False,
        targets: CellTargets | None = None,
        thinning: float = 0.0,
    ):
        self.tokenizer = tokenizer
        self.targets, self.thinning = targets, thinning
        self.packing = packing
        self.mlm_probability = mlm_probability
        self.replace_probability = replace_probability
        self.seed = seed

    def __call__(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        bins = batch["bins"]
        if self.thinning:
            own = [np.random.default_rng((self.seed, int(index), 1)) for index in batch["indices"]]
            bins = thin_cells(bins, bin_values(self.tokenizer), self.thinning, own)
        arrays = self.tokenizer.encode_bins(bins)
        ids, mask = arrays["input_ids"], self.tokenizer.mask_token_id
        own = [np.random.default_rng((self.seed, int(index))) for index in batch["indices"]]
        uniform = np.concatenate([rng.random((n, 2)) for rng, n in zip(own, np.count_nonzero(ids, axis=1))])
        arrays["input_ids"], arrays["labels"] = mask_expression(
            ids, mask, uniform, self.mlm_probability, self.replace_probability
        )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.packing:
            tensors = pack(tensors)
        if self.targets is not None:
            tensors["cell_targets"] = torch.from_numpy(self.targets(batch["bins"], batch["files"]))
        # so that a batch that goes wrong can be named
        return tensors | {"indices": torch.from_numpy(batch["indices"])}


def mask_expression(
    input_ids: np.ndarray,
    mask_token_id: int,
    uniform: np.ndarray,
    mlm_probability: float = 0.15,
    replace_probability: float = 0.9,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Choose ``ceil(mlm_probability * expressed)`` expressed tokens of every cell and hide most of them.

    Zeros (genes without expression, the trailing token, pads) are never chosen, and no token is replaced by a
    random one; one that is chosen and not hidden is asked for all the same. Source: Yang et al. 2022, as described in
    its methods. Of ids [batch, length], and two random numbers in [0, 1) for each expressed token of the batch in
    reading order, [tokens, 2]; gives the ids with mask tokens, and the true ids of the chosen with -100 elsewhere.
    """
    rows, columns = np.nonzero(input_ids)
    counts = np.bincount(rows, minlength=len(input_ids))
    # rank of every token within its cell, by its random number
    order = np.lexsort((uniform[:, 0], rows))
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(rows), dtype=np.int64)
    ranks[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    # without the slack, 0.15 * 20 and the like could round up past the whole number they are
    quota = np.ceil(mlm_probability * counts - 1e-9)
    chosen = ranks < quota[rows]
    labels = np.full(input_ids.shape, -100, dtype=np.int64)
    labels[rows[chosen], columns[chosen]] = input_ids[rows[chosen], columns[chosen]]
    hidden = chosen & (uniform[:, 1] < replace_probability)
    masked = input_ids.copy()
    masked[rows[hidden], columns[hidden]] = mask_token_id
    return masked, labels
