"""Learning-rate schedules that transformers does not have."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..tokenization import InputError


def cosine_restart_rate(
    time: int,
    first_cycle: int = 15,
    cycle_growth: float = 2.0,
    warmup: int = 5,
    min_rate: float = 1e-6,
    max_rate: float = 1e-4,
    decay: float = 0.9,
) -> float:
    """
    Learning rate of cosine annealing with warm-up restarts.

    A cycle climbs linearly from `min_rate` over `warmup` units of time and falls along a cosine to `min_rate`
    again. The cosine part of every next cycle is `cycle_growth` times as long, and its peak is lower by `decay`. The
    length of the first cycle has the warm-up in it; `max_rate` is its highest. The original scBERT's unit is an epoch.
    An `InputError` if a cycle has nothing but its warm-up, or cycles become shorter.

    Examples
    --------
    >>> [round(cosine_restart_rate(epoch) * 1e4, 2) for epoch in (0, 5, 14, 15, 20)]
    [0.01, 1.0, 0.03, 0.01, 0.9]
    """
    if not 0 <= warmup <= first_cycle - 1 or cycle_growth < 1:
        raise InputError(
            f"The cosine restarts have a first_cycle of {first_cycle}, a warmup of {warmup} and a cycle_growth of "
            f"{cycle_growth}: a cycle must be longer than its warm-up by 1 or more, and cycles must not become shorter "
            "(cycle_growth 1 or more). Set all three in cosine_restarts."
        )
    cycle, length = 0, first_cycle
    while time >= length:
        time -= length
        length = int((length - warmup) * cycle_growth) + warmup
        cycle += 1
    span = max_rate * decay**cycle - min_rate
    if time < warmup:
        return min_rate + span * time / warmup
    return min_rate + span * (1 + math.cos(math.pi * (time - warmup) / (length - warmup))) / 2


def cosine_restarts(optimizer: Optimizer, max_rate: float, steps_per_unit: int, **shape: float) -> LambdaLR:
    """
    `cosine_restart_rate` as a scheduler that is stepped with the optimizer, whose groups keep their ratios.

    A unit of time is `steps_per_unit` steps: those of an epoch, as in the original.
    """

    def factor(step: int) -> float:
        return cosine_restart_rate(step // steps_per_unit, max_rate=max_rate, **shape) / max_rate

    return LambdaLR(optimizer, factor)
