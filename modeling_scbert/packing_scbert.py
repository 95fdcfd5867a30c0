"""
Packing: several cells one after another in one row, so that no padding is computed anywhere.

A packed batch has one row, and for its attention mask the bounds of its cells, ``[cells + 1]`` whole numbers from 0 to
the row's length. Attention stays within a cell, so it runs cell by cell, whatever its type; everything that works on
single tokens runs on the row as it is. The outputs are those of the padded batch.
"""

import torch


def is_packed(attention_mask: torch.Tensor | None) -> bool:
    """Whether a mask holds the bounds of packed cells; a mask of tokens is ``[batch, length]``."""
    return attention_mask is not None and attention_mask.dim() == 1


def per_cell(function, hidden_states: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """
    Apply a function of ``[1, length, ...]`` to every cell of a packed row.

    Parameters
    ----------
    function
        Tensor to tensor of the same length.
    hidden_states
        ``[1, tokens, ...]``.
    bounds
        ``[cells + 1]``, rising from 0 to ``tokens``.

    Returns
    -------
    ``[1, tokens, ...]``.

    Raises
    ------
    ValueError
        If there are several rows, or the bounds do not fit the row.

    Examples
    --------
    >>> per_cell(lambda cell: cell.cumsum(1), torch.ones(1, 5, 1), torch.tensor([0, 2, 5])).flatten().tolist()
    [1.0, 2.0, 1.0, 2.0, 3.0]
    """
    places = bounds.tolist()
    fits = places[0] == 0 and places[-1] == hidden_states.shape[1] and places == sorted(set(places))
    if hidden_states.shape[0] != 1 or not fits:
        raise ValueError(
            f"Packed cells stand in one row, with bounds that rise from 0 to its length; found "
            f"{tuple(hidden_states.shape[:2])} rows and tokens and the bounds {places[:3]}...{places[-1]}."
        )
    return torch.cat([function(hidden_states[:, a:b]) for a, b in zip(places, places[1:])], dim=1)


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A padded batch as a packed one.

    Parameters
    ----------
    batch
        Tensors ``[batch, length]`` by name, the ``attention_mask`` among them (without one there is no padding, and
        the batch comes back as it is); others, such as one number a cell, stay as they are.

    Returns
    -------
    The same names with tensors ``[1, tokens]``, and the bounds as ``attention_mask``.

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

    Parameters
    ----------
    tokens
        ``[1, tokens, ...]``.
    bounds
        ``[cells + 1]``.

    Returns
    -------
    ``[cells, longest, ...]``.

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
