"""Every visit to a cell has a number, which alone decides what is random about it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler


class NumberedCells(Dataset):
    """
    A map-style data set whose items say which visit to which cell they are.

    Item ``epoch * len(cells) + i`` is cell ``i`` with that number under ``"draw"``.

    Parameters
    ----------
    cells
        Data set of dicts, such as `CellDataset`.

    Examples
    --------
    >>> visits = NumberedCells([{"a": 1}, {"a": 2}])
    >>> visits[3]
    {'a': 2, 'draw': 3}
    """

    def __init__(self, cells: Any):
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        return {**self.cells[draw % len(self.cells)], "draw": int(draw)}

    def __getitems__(self, draws: list[int]) -> list[dict[str, Any]]:
        places = [draw % len(self.cells) for draw in draws]
        # cells on disk are read a batch at a time
        together = getattr(self.cells, "__getitems__", None)
        items = together(places) if together else [self.cells[place] for place in places]
        return [{**item, "draw": int(draw)} for item, draw in zip(items, draws)]


class NumberedSampler(Sampler[int]):
    """
    Every cell once an epoch, in an order that seed and epoch decide, as numbers for `NumberedCells`.

    No state is kept, so a run resumed in the middle of an epoch sees what an uninterrupted one would have seen,
    and every process draws the same list (accelerate then deals it out).

    Parameters
    ----------
    size
        Number of cells.
    seed
        With the epoch, decides the order.
    """

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        yield from (order + self.epoch * self.size).tolist()
