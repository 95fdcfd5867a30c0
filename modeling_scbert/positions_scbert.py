"""Some positions of a sequence only: a loss at few tokens needs no more of the last block than its output there."""

import torch


def rows_at(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """
    Rows of every sequence.

    Parameters
    ----------
    positions
        ``[batch, n]``.
    x
        ``[batch, length, ...]``.

    Returns
    -------
    ``[batch, n, ...]``.

    Examples
    --------
    >>> rows_at(torch.tensor([[2, 0]]), torch.tensor([[5, 6, 7]]))
    tensor([[7, 5]])
    """
    return x.take_along_dim(positions.reshape(*positions.shape, *[1] * (x.dim() - 2)), dim=1)


def labelled_positions(labels: torch.Tensor, ignored: int = -100) -> torch.Tensor | None:
    """
    Positions of the labelled tokens of a batch, in order.

    Parameters
    ----------
    labels
        ``[batch, length]``.
    ignored
        Label of tokens that have none.

    Returns
    -------
    ``[batch, n]`` with the largest number of labelled tokens of a sequence as ``n``; shorter rows go on with tokens
    that have no label. None if no token has any.

    Examples
    --------
    >>> labelled_positions(torch.tensor([[-100, 3, -100, 4], [-100, -100, 5, -100]]))
    tensor([[1, 3],
            [2, 0]])
    """
    labelled = labels != ignored
    n_labelled = int(labelled.sum(1).max()) if labelled.numel() else 0
    return labelled.int().argsort(dim=1, descending=True, stable=True)[:, :n_labelled] if n_labelled else None
