"""Cells of like length in one batch: less padding, and nothing else changed."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

# batches sorted together; more would make batches of ever the same cells
BATCHES_PER_GROUP = 8


class LengthGroupedSampler(Sampler[int]):
    """
    Every cell once, in random order, with cells of like length side by side.

    Cells are shuffled, cut into groups of eight batches, sorted within a group, and the batches shuffled. The order
    is decided by seed and epoch alone, so that a resumed run sees the order of an uninterrupted one.

    Parameters
    ----------
    lengths
        Expressed genes of every cell, [cells].
    batch_size
        Cells of one step's batch over all processes.
    seed
        With the epoch, decides the order.

    Examples
    --------
    >>> list(LengthGroupedSampler(np.array([5, 1, 5, 1]), batch_size=2)) in ([1, 3, 0, 2], [0, 2, 1, 3])
    True
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self))
        group = self.batch_size * BATCHES_PER_GROUP
        parts = [order[start : start + group] for start in range(0, len(order), group)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        # an incomplete batch stays last: anywhere else it would shift the others' bounds
        rest = batches[len(whole) :]
        yield from (int(i) for n in generator.permutation(len(whole)) for i in whole[n])
        yield from (int(i) for batch in rest for i in batch)
