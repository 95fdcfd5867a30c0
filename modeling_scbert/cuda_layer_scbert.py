"""
A whole FAVOR+ block on CUDA in bfloat16: few passes over memory, and next to nothing kept for the backward.

The same function as the plain block, with the kernels of favor_triton_scbert.py, one product for queries, keys and
values, norms that leave bfloat16, and a feed-forward network whose hidden layer never reaches memory. The residual
stream keeps its dtype. Attention's output stays less the mean of the values, which the output projection's bias takes
up, cell by cell. A block in training keeps its input and the context, and computes the rest again, a few cells at once.

Before blocks of a size are run for the first time, a small one is compared with the plain block.
"""

import logging
import os

import torch
from torch import nn

from .backends_scbert import favor_backend, log_once
from .blocks_scbert import run_plain
from .chunked_layer_scbert import is_trained
from .cuda_steps_scbert import CudaSteps, Settings
from .favor_chunks_scbert import cell_groups
from .favor_triton_scbert import FATAL_ERRORS, LAUNCH_ERRORS, on_device, triton_supports
from .published_layer_scbert import WEIGHTS, what_was_added

# tokens that are computed at once: enough to fill a GPU, few enough to spare its memory
GROUP_TOKENS = 1 << 16
# hidden sizes beyond this do not fit the feed-forward kernels
MAX_HIDDEN = 208
# of the output and gradients of the block that is tried, relative to their largest entry; bfloat16 explains a tenth
MAX_ERROR = 0.1

# kinds of blocks that have been tried, and why some are not to be run
_tried: dict[tuple, str | None] = {}


def cuda_supports(layer: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why the kernels cannot run a FAVOR+ block, if they cannot; the published one is served, with nothing added."""
    projection, dtype = layer.attention.projection_matrix, _computed_in(hidden_states)
    query = hidden_states.new_empty((1, 1, 0, projection.shape[1]), dtype=dtype)
    reason = triton_supports(query, query, projection)
    if reason:
        return reason
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dtype != torch.bfloat16 and not interpreted:
        return "it computes in bfloat16, under autocast or in a model of that dtype"
    if hidden_states.shape[-1] > MAX_HIDDEN:
        return f"the hidden size is beyond {MAX_HIDDEN}"
    if 0 in hidden_states.shape:
        return "the batch is empty"
    return what_was_added(layer) or _what_failed(layer, hidden_states)


def _computed_in(hidden_states: torch.Tensor) -> torch.dtype:
    kind = hidden_states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype


def _what_failed(layer: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why blocks of a kind are left to others: their kernels did not launch, or gave something else; tried once."""
    config, trained = layer.attention.config, is_trained(layer, hidden_states)
    kind = (hidden_states.device, hidden_states.dtype, _computed_in(hidden_states), trained)
    kind += (config.hidden_size, config.intermediate_size, config.num_attention_heads)
    kind += tuple(layer.attention.projection_matrix.shape)
    if kind not in _tried:
        try:
            error = _difference_from_plain(layer, hidden_states, trained)
            _tried[kind] = None if error <= MAX_ERROR else f"its relative error is {error:.0e} on this GPU"
        except FATAL_ERRORS:
            raise
        except LAUNCH_ERRORS as failure:
            _tried[kind] = f"a kernel does not run here ({failure})"
        if _tried[kind]:
            log_once(logging.WARNING, f"Blocks run without the kernels for CUDA, slower: {_tried[kind]}.")
    return _tried[kind]


def _difference_from_plain(layer: nn.Module, hidden_states: torch.Tensor, trained: bool) -> float:
    """Largest relative difference of a fresh block's output, and gradients if they are wanted, some keys masked."""
    device, dtype, config = hidden_states.device, _computed_in(hidden_states), layer.attention.config
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(trained),
        favor_backend("naive"),
    ):
        torch.manual_seed(0)
        block = type(layer)(config, 0).float().to(device)
        rows = torch.randn(2, 150, config.hidden_size, dtype=torch.float32).to(hidden_states)
        keep = (torch.rand(2, 150, dtype=torch.float32) < 0.7).to(device)
        results = []
        for run, x, enabled in ((run_cuda, rows, dtype != rows.dtype), (run_plain, rows.float(), False)):
            x = x.clone().requires_grad_(trained)
            with torch.autocast(device.type, dtype, enabled=enabled):
                results.append([run(block, x, keep)])
            if trained:
                grad = rows.flip(1).to(results[-1][0].dtype)
                results[-1] += torch.autograd.grad(results[-1][0], [x, *block.parameters()], grad)
        errors = [(x.float() - y).abs().max() / y.abs().max() for x, y in zip(*results, strict=True)]
        # of tensors, whose maximum does not lose what is no number
        return torch.stack(errors).max().item()


def run_cuda(layer, hidden_states, attention_mask=None, queries=None) -> torch.Tensor:
    """A block's output by the kernels, see `run_block` of blocks_scbert.py; differentiable in its input and weights."""
    weights, config = dict(layer.named_parameters()), layer.attention.config
    settings = Settings(
        _computed_in(hidden_states),
        config.num_attention_heads,
        config.kernel_epsilon,
        layer.ffn_norm.eps,
    )
    keep = None if attention_mask is None else attention_mask.bool()
    hidden_states, queries = (None if x is None else x.contiguous() for x in (hidden_states, queries))
    given = (hidden_states, keep, queries, layer.attention.projection_matrix)
    return _CudaLayer.apply(settings, *given, *(weights[name] for name in WEIGHTS))


class _CudaLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, hidden_states, keep, queries, projection, *weights):
        rows = hidden_states if queries is None else queries
        output, kept = torch.empty_like(rows), []
        with torch.autocast(rows.device.type, enabled=False), on_device(rows.device):
            steps = CudaSteps(settings, projection, weights)
            for group in cell_groups(*hidden_states.shape[:2], GROUP_TOKENS):
                kept += steps.forward(*_of_cells(group, hidden_states, keep, queries), output[group])
        ctx.settings = settings
        # without a gradient nothing is kept
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden_states, keep, queries, projection, *weights, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, keep, queries, projection, *rest = ctx.saved_tensors
        weights, kept = rest[: len(WEIGHTS)], rest[len(WEIGHTS) :]
        wanted = zip(WEIGHTS, weights, ctx.needs_input_grad[5:], strict=True)
        grads = {name: torch.zeros_like(weight) for name, weight, needed in wanted if needed}
        hidden_grad = torch.empty_like(hidden_states)
        query_grad = None if queries is None else torch.empty_like(queries)
        groups = cell_groups(*hidden_states.shape[:2], GROUP_TOKENS)
        each = len(kept) // len(groups)
        with torch.autocast(grad.device.type, enabled=False), on_device(grad.device):
            steps = CudaSteps(ctx.settings, projection, weights)
            for index, group in enumerate(groups):
                given = _of_cells(group, hidden_states, keep, queries, grad.contiguous())
                tables = kept[index * each : (index + 1) * each]
                steps.backward(*given, tables, grads, *_of_cells(group, hidden_grad, query_grad))
        return None, hidden_grad, None, query_grad, None, *(grads.get(name) for name in WEIGHTS)


def _of_cells(group: slice, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x[group] for x in tensors]
