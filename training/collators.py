"""Sparse rows of binned cells to dense batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.cell_dataset import stack_rows
from ..modeling_scbert.packing_scbert import pack
from ..tokenization import ScBertTokenizer


class DataCollatorForCells:
    """
    Batches of `CellDataset` items: what the tokenizer says of them, and their labels.

    Parameters
    ----------
    tokenizer
        Makes the rows dense: every gene of the panel, or the expressed ones padded to the longest cell.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> from scbert import ScBertTokenizer
    >>> from scbert.data.cell_dataset import CellDataset
    >>> cells = CellDataset(sp.csr_matrix(np.array([[0, 2], [3, 1]], dtype=np.int8)), labels=[1, 0])
    >>> DataCollatorForCells(ScBertTokenizer(gene_panel=["CD3E", "MS4A1"]))([cells[0], cells[1]])["input_ids"]
    tensor([[0, 2, 0],
            [3, 1, 0]])
    """

    def __init__(self, tokenizer: ScBertTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        bins = stack_rows(items, len(self.tokenizer.gene_panel))
        batch = {name: torch.from_numpy(array) for name, array in self.tokenizer.encode_bins(bins).items()}
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch


class DataCollatorForMaskedExpression:
    """
    Batches for masked expression modelling: some expressed genes of each cell are hidden and asked for.

    Items that carry a ``"draw"`` number (see `NumberedCells`) are masked by seed and draw alone, whatever batch,
    worker or process they fall into; others by a generator of the collator, in order.

    Parameters
    ----------
    tokenizer
        Makes the rows dense, and names the mask.
    mlm_probability, replace_probability, seed
        As in `mask_expression`; the seed decides every draw.
    packing
        Put the cells of a batch one after another in one row, without padding (see `packing_scbert.pack`); the
        masks are those of the padded batch. Nothing changes where every cell has every gene.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> from scbert import ScBertTokenizer
    >>> from scbert.data.cell_dataset import CellDataset
    >>> cells = CellDataset(sp.csr_matrix(np.array([[0, 2], [3, 1]], dtype=np.int8)))
    >>> collator = DataCollatorForMaskedExpression(ScBertTokenizer(gene_panel=["CD3E", "MS4A1"]))
    >>> (collator([cells[0], cells[1]])["labels"] != -100).sum(dim=1)
    tensor([1, 1])
    """

    def __init__(
        self,
        tokenizer: ScBertTokenizer,
        mlm_probability: float = 0.15,
        replace_probability: float = 0.9,
        seed: int = 0,
        packing: bool = False,
    ):
        self.tokenizer = tokenizer
        self.packing = packing
        self.mlm_probability = mlm_probability
        self.replace_probability = replace_probability
        self.seed = seed
        self._generator = np.random.default_rng(seed)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer.encode_bins(stack_rows(items, len(self.tokenizer.gene_panel)))
        counts = np.count_nonzero(batch["input_ids"], axis=1)
        batch["input_ids"], batch["labels"] = mask_expression(
            batch["input_ids"],
            self.tokenizer.mask_token_id,
            self._uniform(items, counts),
            self.mlm_probability,
            self.replace_probability,
        )
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.packing:
            tensors = pack(tensors)
        if "draw" in items[0]:
            # so that a batch that goes wrong can be named
            tensors["draw"] = torch.tensor([item["draw"] for item in items])
        return tensors

    def _uniform(self, items: Sequence[dict[str, Any]], counts: np.ndarray) -> np.ndarray:
        """Two random numbers for every expressed token of the batch, [tokens, 2]."""
        if "draw" not in items[0]:
            return self._generator.random((counts.sum(), 2))
        generators = (np.random.default_rng((self.seed, item["draw"])) for item in items)
        return np.concatenate([rng.random((n, 2)) for rng, n in zip(generators, counts)])


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
    random one. Source: Yang et al. 2022, as described in its methods.

    Parameters
    ----------
    input_ids
        Expression ids [batch, length].
    mask_token_id
        What a hidden token becomes.
    uniform
        Random numbers in [0, 1), two for each expressed token of the batch in reading order, [tokens, 2].
    mlm_probability
        Share of the expressed tokens that is chosen, rounded up.
    replace_probability
        Probability that a chosen token is hidden; the others stay and are asked for all the same.

    Returns
    -------
    masked, labels
        Both [batch, length]: the ids with mask tokens, and the true ids of the chosen with -100 elsewhere.
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
