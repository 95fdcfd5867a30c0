"""
A whole block of FAVOR+ attention and feed-forward network, and the backends that compute it.

- ``cuda``: kernels for CUDA, from the installed package; bfloat16, keeps next to nothing for the backward;
- ``compiled``: C++ compiled for the machine's processor, from the installed package; chosen where much work is ahead;
- ``chunked``: chunks of positions that stay in cache; keeps next to nothing for the backward;
- ``plain``: one operation after another, for everything; its attention is `favor_attention`.

Blocks of other attention types are always plain.
"""

import torch
from torch import nn

from .backends_scbert import Backend, from_package, select
from .chunked_layer_scbert import chunked_supports, is_trained, run_chunked
from .favor_engine_scbert import other_attention_asked
from .packing_scbert import in_batches, is_packed
from .workload_scbert import FLOPS, flops_per_token, note_work, seconds_ahead

# queries of a batch up to this size are left to plain autograd: with little to compute, calls cost more than memory
KEPT_BYTES = 16 << 20
# a cell's block, forward by one thread, below this gains too little from being compiled
MIN_CELL_SECONDS = 0.01


def choose_block(layer: nn.Module, hidden_states: torch.Tensor, output_attentions: bool = False) -> str:
    """
    Name of the backend that is to run a block, a `ScBertLayer`, on hidden states ``[batch, length, hidden]``.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> layer = ScBertLayer(ScBertConfig(hidden_size=32), 0)
    >>> choose_block(layer, torch.randn(1, 50, 32)), choose_block(layer.eval(), torch.randn(1, 50, 32))
    ('plain', 'plain')
    >>> choose_block(layer.requires_grad_(False), torch.randn(1, 50, 32))
    'chunked'
    """
    # what is traced must not depend on sizes, and is optimised by who traces it
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "plain"
    if hidden_states.device.type == "cpu":
        note_work(layer, hidden_states)
        package = from_package("cpu_matmul_scbert")
        if package is not None:
            package.consider_onednn(seconds_ahead())
    if output_attentions or not hasattr(layer.attention, "projection_matrix"):
        return "plain"
    return select(BLOCKS, layer, hidden_states)


def run_block(
    name: str,
    layer: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    A block's output by a backend that supports it, a new tensor ``[batch, length, hidden]`` or ``[batch, n, hidden]``.

    The mask ``[batch, length]`` is true where a position may be attended to, or holds the bounds of packed cells.
    ``queries [batch, n, hidden]`` are rows of ``hidden_states`` at which alone the output is wanted; all by default.
    """
    run = BLOCKS[name].run
    if name != "plain" and is_packed(attention_mask):
        return in_batches(lambda *cells: run(layer, *cells), hidden_states, attention_mask)
    return run(layer, hidden_states, attention_mask, queries)


def run_plain(layer, hidden_states, attention_mask=None, queries=None, output_attentions=False):
    """A block's output by one operation after another, each on all positions."""
    rows = hidden_states if queries is None else queries
    residual = rows + layer.attend(hidden_states, attention_mask, output_attentions, queries)
    return residual + layer.feed_forward(residual)


def _chunked_supports(layer, hidden_states):
    return other_attention_asked("chunked") or chunked_supports(layer, hidden_states)


def _chunked_pays(layer, hidden_states):
    config = layer.attention.config
    width = config.num_attention_heads * config.head_dim
    query_bytes = hidden_states[..., 0].numel() * width * hidden_states.itemsize
    if query_bytes < KEPT_BYTES and is_trained(layer, hidden_states):
        return "what a backward needs is small enough to be kept"
    return None


def _compiled_supports(layer, hidden_states):
    package = from_package("compiled_layer_scbert")
    if package is None:
        return "it comes with the package scbert, which is not installed"
    return other_attention_asked("compiled") or package.compiled_supports(layer, hidden_states)


def _compiled_pays(layer, hidden_states):
    if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
        return "it is for float32 on CPUs"
    if hidden_states.shape[1] * flops_per_token(layer.attention.config) / FLOPS < MIN_CELL_SECONDS:
        return "cells are small"
    package = from_package("compiled_layer_scbert")
    if package is not None and seconds_ahead() < package.seconds_to_pay():
        return "too little work is known to be ahead"
    return None


def _cuda_supports(layer, hidden_states):
    package = from_package("cuda_layer_scbert")
    if package is None:
        return "the packages scbert and triton, which it needs, are not both installed"
    return other_attention_asked("triton") or package.cuda_supports(layer, hidden_states)


BLOCKS = {
    "cuda": Backend(_cuda_supports, lambda *given: from_package("cuda_layer_scbert").run_cuda(*given)),
    "compiled": Backend(
        _compiled_supports,
        lambda *given: from_package("compiled_layer_scbert").run_compiled(*given),
        _compiled_pays,
    ),
    "chunked": Backend(_chunked_supports, run_chunked, _chunked_pays),
    "plain": Backend(lambda *_: None, run_plain),
}
