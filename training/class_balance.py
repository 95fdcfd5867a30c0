"""Rare classes made to count: a weighted loss, or a sampler that draws them more often."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def class_weights(targets: np.ndarray, n_classes: int) -> torch.Tensor:
    """
    Weights inverse to class size, with mean 1 over the training cells.

    Parameters
    ----------
    targets
        Class of every training cell, [cells].
    n_classes
        Number of classes; each needs a cell.

    Returns
    -------
    torch.Tensor
        float32 [classes].

    Examples
    --------
    >>> class_weights(np.array([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = np.bincount(targets, minlength=n_classes)
    return torch.tensor(len(targets) / (n_classes * np.maximum(counts, 1)), dtype=torch.float32)


def weighted_loss(weights: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """
    Cross-entropy for `transformers.Trainer(compute_loss_func=...)`.

    The sum over cells is divided by the number of cells of the whole step, which the Trainer counts over the
    micro-batches of an accumulation and over processes. Weights have mean 1 over the training set and are not
    renormalised within a micro-batch, so a step's gradient is the same however it is cut.

    Parameters
    ----------
    weights
        One per class, or None for equal ones.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        logits = outputs["logits"].float()
        weight = None if weights is None else weights.to(logits.device)
        total = torch.nn.functional.cross_entropy(logits, labels, weight, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


class OversamplingSampler(Sampler[int]):
    """
    As many draws as cells, with replacement, every class equally likely.

    The draw is decided by the seed and the epoch alone, so that a resumed run sees what an uninterrupted one
    would have seen, and every process draws the same list (accelerate then deals it out).

    Parameters
    ----------
    targets
        Class of every training cell, [cells].
    seed
        With the epoch, decides the draw.
    """

    def __init__(self, targets: np.ndarray, seed: int = 0):
        self.probabilities = 1.0 / np.bincount(targets)[targets]
        self.probabilities /= self.probabilities.sum()
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.probabilities)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        yield from generator.choice(len(self), len(self), p=self.probabilities).tolist()
