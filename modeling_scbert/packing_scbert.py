"""
Packing: several cells one after another in one row, so that no padding is computed anywhere.

A packed batch has one row, and for its attention mask the bounds of its cells, ``[cells + 1]`` whole numbers from 0 to
the row's length. Attention stays within a cell, so it runs on padded batches of cells of like length, whatever its
type; everything that works on single tokens runs on the row as it is. The outputs are those of the padded batch.
"""

import torch

# padding that cells of like length may have: a share of their tokens, or as many tokens as another batch would cost by
# its calls (measured on a CPU, estimated of a GPU)
MAX_PADDING, MIN_PADDING = 0.1, {"cpu": 256, "cuda": 1 << 14}


def is_packed(attention_mask: torch.Tensor | None) -> bool:
    """Whether a mask holds the bounds of packed cells; a mask of tokens is ``[batch, length]``."""
    return attention_mask is not None and attention_mask.dim() == 1


def in_batches(function, hidden_states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """
    Apply a function of padded batches to the cells of a packed row ``[1, tokens, ...]``; its output is one, too.

    The function is called with ``[cells, longest, ...]`` and a mask ``[cells, longest]``, true at tokens, or None where
    all are; it gives a tensor of that length, whatever stands at padding. Cells of like length share a batch, so that
    there are few of them however many cells there are. Several rows, or bounds ``[cells + 1]`` that do not rise from 0
    to ``tokens``, are a ValueError.

    Examples
    --------
    >>> row, bounds = torch.ones(1, 5, 1), torch.tensor([0, 2, 5])
    >>> in_batches(lambda cells, mask: cells.cumsum(1), row, bounds).flatten().tolist()
    [1.0, 2.0, 1.0, 2.0, 3.0]
    """
    places = bounds.tolist()
    fits = places[0] == 0 and places[-1] == hidden_states.shape[1] and places == sorted(set(places))
    if hidden_states.shape[0] != 1 or not fits:
        raise ValueError(
            f"Packed cells stand in one row, with bounds that rise from 0 to its length; found "
            f"{tuple(hidden_states.shape[:2])} rows and tokens and the bounds {places[:3]}...{places[-1]}."
        )
    device, found, order = hidden_states.device, [], []
    # where everything goes is worked out on the CPU: a GPU only gets the places
    spare = MIN_PADDING.get(device.type, MIN_PADDING["cpu"])
    for starts, lengths in _of_like_length(torch.tensor(places), spare):
        steps = torch.arange(int(lengths.max()))
        keep, rows = steps < lengths[:, None], starts[:, None] + steps
        order.append(rows[keep])
        # padding repeats the first token of a cell: it is masked, and its output is not read
        rows = torch.where(keep, rows, starts[:, None]).flatten().to(device)
        batch = hidden_states[0].index_select(0, rows).unflatten(0, keep.shape)
        output = function(batch, None if keep.all() else keep.to(device))
        found.append(output.flatten(0, 1).index_select(0, keep.flatten().nonzero()[:, 0].to(device)))
    return torch.cat(found).index_select(0, torch.cat(order).argsort().to(device))[None]


def _of_like_length(places: torch.Tensor, spare: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Starts and lengths of the cells of each batch, the longest first."""
    lengths, cells = places.diff().sort(descending=True, stable=True)
    batches, first, tokens = [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        padding = (place - first + 1) * int(lengths[first]) - tokens - length
        if padding > max(spare, MAX_PADDING * tokens):
            batches.append(slice(first, place))
            first, tokens = place, 0
        tokens += length
    return [(places[cells[batch]], lengths[batch]) for batch in [*batches, slice(first, len(cells))]]


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A padded batch as a packed one: tensors ``[batch, length]`` as ``[1, tokens]``, and bounds as ``attention_mask``.

    Without such a mask there is no padding, and the batch comes back as it is; tensors of other shapes, such as one
    number a cell, stay as they are.

    Examples
    --------
    >>> packed = pack({"input_ids": torch.tensor([[3, 0], [2, 5]]), "attention_mask": torch.tensor([[1, 0], [1, 1]])})
    >>> packed["input_ids"].tolist(), packed["attention_mask"].tolist()
    ([[3, 2, 5]], [0, 1, 3])
    """
    if "attention_mask" not in batch:
        return batch
    keep = batch["attention_mask"].bool()
    rows = {name: x[keep][None] if x.shape == keep.shape else x for name, x in batch.items()}
    return {**rows, "attention_mask": torch.nn.functional.pad(keep.sum(dim=1).cumsum(dim=0), (1, 0))}


def unpack(tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """
    A packed row as a padded batch, with zeros for padding.

    From ``[1, tokens, ...]`` and bounds ``[cells + 1]`` to ``[cells, longest, ...]``.

    Examples
    --------
    >>> unpack(torch.tensor([[3, 2, 5]]), torch.tensor([0, 1, 3])).tolist()
    [[3, 0], [2, 5]]
    """
    return torch.nn.utils.rnn.pad_sequence(tokens[0].split(bounds.diff().tolist()), batch_first=True)


def unpacked(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, gene_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Hidden states, mask of tokens and gene ids of a padded batch, whether they came packed or not."""
    if not is_packed(attention_mask):
        return hidden_states, attention_mask, gene_ids
    if gene_ids is None:
        raise ValueError("Packed cells need gene_ids: a token's place in the row does not tell its gene.")
    ones = hidden_states.new_ones(hidden_states.shape[:2])
    return tuple(unpack(x, attention_mask) for x in (hidden_states, ones, gene_ids))
