"""Orders in which cells are learnt from; seed and epoch alone decide them, so that a resumed run goes on in its own."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

# batches sorted together; more would make batches of ever the same cells
BATCHES_PER_GROUP = 8


class EpochSampler(Sampler[int]):
    """
    Every cell once an epoch, in random order, as indices of `CellDataset` that go on counting from epoch to epoch.

    No state is kept: a run resumed in the middle of an epoch sees what an uninterrupted one would have seen, and every
    process draws the same list (accelerate then deals it out).

    Examples
    --------
    >>> order = EpochSampler(3)
    >>> order.set_epoch(2)
    >>> sorted(order)
    [6, 7, 8]
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
        yield from (self.generator().permutation(self.size) + self.epoch * self.size).tolist()

    def generator(self) -> np.random.Generator:
        """The generator of this epoch."""
        return np.random.default_rng([self.seed, self.epoch])


class OversamplingSampler(EpochSampler):
    """As many draws as cells [cells] have classes `targets`, with replacement, every class equally likely."""

    def __init__(self, targets: np.ndarray, seed: int = 0):
        super().__init__(len(targets), seed)
        self.probabilities = 1.0 / np.bincount(targets)[targets]
        self.probabilities /= self.probabilities.sum()

    def __iter__(self) -> Iterator[int]:
        yield from self.generator().choice(self.size, self.size, p=self.probabilities).tolist()


class LengthGroupedSampler(EpochSampler):
    """
    Every cell once, in random order, with cells of like length side by side: less padding, and nothing else changed.

    Cells are shuffled, cut into groups of eight batches, sorted within a group, and the batches shuffled. The lengths
    are the expressed genes of every cell; a batch is that of one step over all processes.

    Examples
    --------
    >>> list(LengthGroupedSampler(np.array([5, 1, 5, 1]), batch_size=2))
    [2, 0, 1, 3]
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(len(lengths), seed)
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        order = generator.permutation(self.size)
        group = self.batch_size * BATCHES_PER_GROUP
        parts = np.split(order, range(group, self.size, group))
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        batches = np.split(order, range(self.batch_size, self.size, self.batch_size))
        n_whole = self.size // self.batch_size
        # an incomplete batch stays last: anywhere else it would shift the others' bounds
        for n in [*generator.permutation(n_whole), *range(n_whole, len(batches))]:
            yield from batches[n].tolist()
