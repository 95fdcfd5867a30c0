"""
How much work a CPU has ahead: what decides whether compiling for it pays.

Whoever knows how many cells will come says so (`expect_work`). What has been computed so far counts as well: a process
that has been at it for a while is likely to go on.
"""

import torch
from torch import nn

# a thread's multiplications and additions a second, roughly; only the order of magnitude matters
FLOPS = 1e11

_work = {"expected": 0.0, "done": 0.0}


def flops_per_token(config) -> float:
    """
    Floating-point operations of one block on one token, forward.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> round(flops_per_token(ScBertConfig()) * 16_907 / 1e9)  # of a cell
    51
    """
    inner = config.num_attention_heads * config.head_dim
    linear = config.hidden_size * (4 * inner + 2 * config.intermediate_size)
    features = 4 * inner * config.num_random_features
    return 2 * (linear + features)


def expect_work(config, tokens: float, training: bool = False) -> None:
    """
    Say how much a model is going to compute in this process: the tokens of all cells still to come, over all epochs.

    Training on them is three times the work.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> expect_work(ScBertConfig(), tokens=0)
    """
    passes = 3 if training else 1
    _work["expected"] = passes * tokens * config.num_hidden_layers * flops_per_token(config)


def note_work(layer: nn.Module, hidden_states: torch.Tensor) -> None:
    """Count a block's forward as done."""
    _work["done"] += hidden_states[..., 0].numel() * flops_per_token(layer.attention.config)


def seconds_ahead() -> float:
    """Seconds of work that can be counted on, at this process's number of threads."""
    return max(_work.values()) / (FLOPS * torch.get_num_threads())
