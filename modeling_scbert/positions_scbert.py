"""Some positions of a sequence only: a loss at few tokens needs no more of the last block than its output there."""

import torch


def rows_at(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """
    Rows ``[batch, n, ...]`` of every sequence ``[batch, length, ...]``, at positions ``[batch, n]``.

    Examples
    --------
    >>> rows_at(torch.tensor([[2, 0]]), torch.tensor([[5, 6, 7]]))
    tensor([[7, 5]])
    """
    return x.take_along_dim(positions.reshape(*positions.shape, *[1] * (x.dim() - 2)), dim=1)


def labelled_positions(labels: torch.Tensor) -> torch.Tensor | None:
    """
    Positions ``[batch, n]`` of the labelled tokens of a batch (not -100), in order; None if there are none.

    ``n`` is the largest number of labelled tokens of a sequence; shorter rows go on with tokens that have no label.

    Examples
    --------
    >>> labelled_positions(torch.tensor([[-100, 3, -100, 4], [-100, -100, 5, -100]]))
    tensor([[1, 3],
            [2, 0]])
    """
    labelled = labels != -100
    n_labelled = int(labelled.sum(1).max()) if labelled.numel() else 0
    return labelled.int().argsort(dim=1, descending=True, stable=True)[:, :n_labelled] if n_labelled else None
