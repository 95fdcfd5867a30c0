"""
A whole FAVOR+ block on CUDA in bfloat16: few passes over memory, and next to nothing kept for the backward.

The same function as the plain block, with the kernels of favor_triton_scbert.py, one product for queries, keys and
values, norms that leave bfloat16, and a feed-forward network whose hidden layer never reaches memory. The residual stream
keeps its dtype. Attention's output stays less the mean of the values, which the output projection's bias takes up, cell
by cell. A block in training keeps its input and the context, and computes the rest again, some cells at a time.
"""

import functools
import os
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation

from .favor_triton_scbert import FavorLaunches, capability_of, processors_of, triton_state, triton_supports
from .feed_forward_kernels_scbert import (
    feed_forward_kernel,
    hidden_gradient_kernel,
    norm_gradient_kernel,
    norm_kernel,
)

# tokens that are computed at once: enough to fill a GPU, few enough to spare its memory
GROUP_TOKENS = 1 << 16
# hidden sizes beyond this do not fit the feed-forward kernels
MAX_HIDDEN = 224
# rows of a program of the norms
NORM_ROWS = 16
WEIGHTS = (
    *("attention_norm.weight", "attention_norm.bias"),
    *("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    *("attention.o_proj.weight", "attention.o_proj.bias"),
    *("ffn_norm.weight", "ffn_norm.bias"),
    *("intermediate.weight", "intermediate.bias", "output.weight", "output.bias"),
)


def cuda_supports(layer: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why the kernels cannot run a FAVOR+ block, if they cannot: the published layer without anything added is served."""
    config = layer.attention.config
    query = hidden_states.new_empty((1, 1, 0, config.head_dim), dtype=_computed_in(hidden_states))
    reason = triton_supports(query, query, layer.attention.projection_matrix)
    if reason:
        return reason
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if query.dtype != torch.bfloat16 and not interpreted:
        return "it computes in bfloat16, under autocast or in a model of that dtype"
    if hidden_states.shape[-1] > MAX_HIDDEN:
        return f"the hidden size is beyond {MAX_HIDDEN}"
    if 0 in hidden_states.shape:
        return "the batch is empty"
    if layer.training and (layer.dropout.p > 0 or layer.attention.dropout.p > 0):
        return "dropout is active"
    if type(layer.activation) is not GELUActivation:
        return "its activation is not GELU"
    if not _is_plain(layer):
        return "it has other weights than the published block, adapters or hooks"
    if layer.attention_norm.eps != layer.ffn_norm.eps:
        return "its norms differ"
    return None


def _computed_in(hidden_states: torch.Tensor) -> torch.dtype:
    kind = hidden_states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype


def _is_plain(layer: nn.Module) -> bool:
    """Whether all weights are those of the published block, in modules of their usual kind that nobody listens to."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    inner = [module for module in layer.modules() if module is not layer]
    changed = any(getattr(module, kind) for module in inner for kind in hooks) or _has_any_global_hook()
    changed = changed or any("forward" in vars(module) for module in inner)
    kinds = {type(module) for module in inner if any(True for _ in module.parameters(recurse=False))}
    names = tuple(name for name, _ in layer.named_parameters())
    return names == WEIGHTS and kinds == {nn.Linear, nn.LayerNorm} and not changed


def run_cuda(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Output of a FAVOR+ `ScBertLayer`, differentiable in its input and weights.

    Parameters
    ----------
    layer
        The block, one that `cuda_supports`.
    hidden_states
        ``[batch, length, hidden]``.
    attention_mask
        ``[batch, length]``, true where a position may be attended to.
    queries
        ``[batch, n, hidden]``: rows of ``hidden_states`` at which alone the output is wanted; by default all.

    Returns
    -------
    ``[batch, length, hidden]`` or ``[batch, n, hidden]``, a new tensor.
    """
    weights = [attrgetter(name)(layer) for name in WEIGHTS]
    keep = None if attention_mask is None else attention_mask.bool()
    hidden_states, queries = (None if x is None else x.contiguous() for x in (hidden_states, queries))
    return _CudaLayer.apply(layer, _computed_in(hidden_states), hidden_states, keep, queries, *weights)


class _CudaLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, dtype, hidden_states, keep, queries, *weights):
        block = _Block(layer, dtype)
        rows = hidden_states if queries is None else queries
        output, kept = torch.empty_like(rows), []
        with torch.autocast(rows.device.type, enabled=False):
            for group in _groups(hidden_states):
                kept += block.forward(*_of_cells(group, hidden_states, keep, queries), output[group])
        ctx.layer, ctx.dtype = layer, dtype
        # without a gradient nothing is kept
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden_states, keep, queries, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, keep, queries, *kept = ctx.saved_tensors
        block = _Block(ctx.layer, ctx.dtype)
        wanted = zip(WEIGHTS, ctx.needs_input_grad[5:], strict=True)
        grads = {name: torch.zeros_like(attrgetter(name)(ctx.layer)) for name, needed in wanted if needed}
        hidden_grad = torch.empty_like(hidden_states)
        query_grad = None if queries is None else torch.empty_like(queries)
        groups = _groups(hidden_states)
        each = len(kept) // len(groups)
        with torch.autocast(grad.device.type, enabled=False):
            for index, group in enumerate(groups):
                given = _of_cells(group, hidden_states, keep, queries, grad.contiguous())
                tables = kept[index * each : (index + 1) * each]
                block.backward(*given, tables, grads, *_of_cells(group, hidden_grad, query_grad))
        return None, None, hidden_grad, None, query_grad, *(grads.get(name) for name in WEIGHTS)


def _groups(hidden_states: torch.Tensor) -> list[slice]:
    """Cells that are computed at once."""
    cells, length, _ = hidden_states.shape
    size = max(1, GROUP_TOKENS // length)
    return [slice(start, start + size) for start in range(0, cells, size)]


def _of_cells(group: slice, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x[group] for x in tensors]


class _Block:
    """A block's weights as the kernels take them, and its steps on some cells."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        attention, self.layer, self.dtype = layer.attention, layer, dtype
        self.heads, self.epsilon = attention.config.num_attention_heads, attention.config.kernel_epsilon
        self.qkv = torch.cat([getattr(attention, f"{x}_proj").weight for x in "qkv"]).to(dtype)
        self.out = attention.o_proj.weight.to(dtype)
        self.inner, self.hidden = self.out.shape[1], self.out.shape[0]
        # both with the hidden size inside
        self.w1 = layer.intermediate.weight.to(dtype).contiguous()
        self.w2 = layer.output.weight.to(dtype).T.contiguous()
        device = self.out.device
        wide = capability_of(device)[0] in (9, 10)
        self.tiles = {
            "C": self.hidden,
            "PIECES": _pieces(self.hidden),
            "INNER": len(self.w1),
            "BLOCK_N": 128 if wide else 64,
            "BLOCK_I": 64 if wide and self.hidden <= 208 else 32,
            "STAGES": 2,
            "PRECISION": "tf32x3" if device.type == "cuda" else "ieee",
            "num_warps": 8,
        }

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, hidden, keep, queries, output) -> list[torch.Tensor]:
        """Writes the output; returns the context's tables."""
        launches = self.launches(*self.project(hidden, queries), keep)
        state = triton_state(launches.query, launches.value, launches.projection)
        with launches.on_device():
            launches.table(launches.sum_keys(), state, keys=True)
            launches.apply_queries(state)
            attended, bias = self.attended(state)
            self.feed_forward(hidden if queries is None else queries, attended, bias, output)
        return state[1:7]

    def project(self, hidden, queries):
        """Queries, keys and values ``[cells, heads, length, d]``, of one product where all rows are queries."""
        normed = self.norm(hidden, self.layer.attention_norm)
        if queries is None:
            return self.split(F.linear(normed, self.qkv), 3)
        query = F.linear(self.norm(queries, self.layer.attention_norm), self.qkv[: self.inner])
        return *self.split(query, 1), *self.split(F.linear(normed, self.qkv[self.inner :]), 2)

    def split(self, joint: torch.Tensor, count: int) -> list[torch.Tensor]:
        return [x.transpose(1, 2) for x in joint.unflatten(-1, (count, self.heads, -1)).unbind(2)]

    def launches(self, query, key, value, keep) -> FavorLaunches:
        projection = self.layer.attention.projection_matrix
        return FavorLaunches(query, key, value, projection, keep, self.epsilon)

    def attended(self, state) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention's branch less its bias, and the bias of each cell ``[cells, hidden]``."""
        centred, mean = state[0].flatten(-2), state[5].view(len(state[0]), self.inner)
        out = self.layer.attention.o_proj
        return F.linear(centred, self.out), torch.addmm(out.bias.float(), mean, out.weight.float().T)

    def norm(self, x, norm, attended=None, bias=None):
        """Normed rows in the kernels' dtype; with a branch also the rows to which it was added."""
        branch = attended is not None
        normed = torch.empty_like(x, dtype=self.dtype)
        residual = torch.empty_like(x) if branch else normed
        tokens = x[..., 0].numel()
        norm_kernel[-(-tokens // NORM_ROWS),](
            *(
                x.contiguous(),
                attended if branch else x,
                bias if branch else norm.weight,
                norm.weight,
                norm.bias,
            ),
            *(normed, residual, x.shape[1], tokens, norm.eps),
            C=self.hidden,
            BLOCK_C=_power(self.hidden),
            BLOCK_N=NORM_ROWS,
            HAS_BRANCH=branch,
        )
        return (normed, residual) if branch else normed

    def feed_forward(self, rows, attended, bias, output) -> None:
        """Attention's branch added, the second branch computed and added."""
        layer, tokens = self.layer, rows[..., 0].numel()
        feed_forward_kernel[-(-tokens // self.tiles["BLOCK_N"]),](
            *(rows.contiguous(), attended, bias, layer.ffn_norm.weight, layer.ffn_norm.bias),
            *(self.w1, layer.intermediate.bias, self.w2, layer.output.bias, output),
            *(rows.shape[1], tokens, layer.ffn_norm.eps),
            **self.tiles,
        )

    # ---- backward ---------------------------------------------------------------------------------------------------

    def backward(self, hidden, keep, queries, grad, tables, grads, hidden_grad, query_grad) -> None:
        """Adds to the weights' gradients, writes those of the rows."""
        query, key, value = self.project(hidden, queries)
        launches = self.launches(query, key, value, keep)
        state = triton_state(query, value, launches.projection)
        state[1:7] = tables
        with launches.on_device():
            launches.apply_queries(state)
            rows = hidden if queries is None else queries
            stream_grad = self.feed_forward_backward(rows, state, grad, grads)
            attended_grad = self.out_backward(state, stream_grad, grads)
            cells, heads, length, dim = key.shape
            joint = key.new_empty(cells, length, 3 if queries is None else 2, heads, dim)
            found = list(joint.unbind(2))
            if queries is not None:
                found.insert(0, query.new_empty(query.transpose(1, 2).shape))
            launches.backward(attended_grad, state, tuple(found))
            self.project_backward(
                hidden, queries, joint, found[0], stream_grad, grads, hidden_grad, query_grad
            )

    def feed_forward_backward(self, rows, state, grad, grads) -> torch.Tensor:
        """Gradient of the residual stream between the branches."""
        layer = self.layer
        normed, residual = self.norm(rows, layer.ffn_norm, *self.attended(state))
        half = grad.to(self.dtype)
        tokens = rows[..., 0].numel()
        active, inner_grad = (half.new_empty(*half.shape[:-1], len(self.w1)) for _ in range(2))
        hidden_gradient_kernel[-(-tokens // self.tiles["BLOCK_N"]),](
            *(normed, half, self.w1, layer.intermediate.bias, self.w2, active, inner_grad, tokens),
            **self.tiles,
        )
        _add(grads, "output.weight", lambda: _product(half, active))
        _add(grads, "output.bias", lambda: _total(grad))
        _add(grads, "intermediate.weight", lambda: _product(inner_grad, normed))
        _add(grads, "intermediate.bias", lambda: _total(inner_grad))
        stream_grad = torch.empty_like(residual)
        self.norm_backward("ffn_norm", residual, inner_grad @ self.w1, grad, stream_grad, grads)
        return stream_grad

    def out_backward(self, state, stream_grad, grads) -> torch.Tensor:
        """Gradient of attention's output ``[cells, heads, length, d]``."""
        half = stream_grad.to(self.dtype)
        by_cell = stream_grad.sum(1, dtype=torch.float32)
        mean = state[5].view(len(by_cell), self.inner)
        _add(
            grads, "attention.o_proj.weight", lambda: _product(half, state[0].flatten(-2)) + by_cell.T @ mean
        )
        _add(grads, "attention.o_proj.bias", lambda: by_cell.sum(0))
        return (half @ self.out).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project_backward(
        self, hidden, queries, joint, query_proj, stream_grad, grads, hidden_grad, query_grad
    ):
        """Gradients of the projections and of what was normed for them."""
        joint = joint.flatten(2)
        normed = self.norm(hidden, self.layer.attention_norm)
        names, weight, residual_grad = [f"attention.{x}_proj.weight" for x in "qkv"], self.qkv, stream_grad
        if queries is not None:
            query_proj = query_proj.flatten(2)
            query_normed = self.norm(queries, self.layer.attention_norm)
            _add(grads, names.pop(0), lambda: _product(query_proj, query_normed))
            normed_grad = query_proj @ self.qkv[: self.inner]
            self.norm_backward("attention_norm", queries, normed_grad, stream_grad, query_grad, grads)
            weight, residual_grad = self.qkv[self.inner :], None
        if any(name in grads for name in names):
            for name, share in zip(names, _product(joint, normed).chunk(len(names)), strict=True):
                _add(grads, name, lambda share=share: share)
        self.norm_backward("attention_norm", hidden, joint @ weight, residual_grad, hidden_grad, grads)

    def norm_backward(self, name, x, normed_grad, residual_grad, x_grad, grads) -> None:
        """Writes the gradient of a norm's input, with that of the residual stream."""
        norm, tokens = getattr(self.layer, name), x[..., 0].numel()
        programs = min(-(-tokens // NORM_ROWS), 4 * processors_of(x.device))
        parts = torch.empty(2, programs, self.hidden, device=x.device)
        norm_gradient_kernel[programs,](
            *(x.contiguous(), normed_grad, normed_grad if residual_grad is None else residual_grad),
            *(norm.weight, x_grad, *parts, tokens, norm.eps),
            C=self.hidden,
            BLOCK_C=_power(self.hidden),
            BLOCK_N=NORM_ROWS,
            HAS_RESIDUAL=residual_grad is not None,
        )
        for kind, part in zip(("weight", "bias"), parts, strict=True):
            _add(grads, f"{name}.{kind}", lambda part=part: part.sum(0))


def _add(grads: dict, name: str, share: Callable[[], torch.Tensor]) -> None:
    """A share of a weight's gradient, if that is wanted."""
    if name in grads:
        grads[name] += share()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum over cells and positions of outer products: a weight's gradient."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)


def _total(x: torch.Tensor) -> torch.Tensor:
    return x.sum((0, 1), dtype=torch.float32)


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@functools.cache
def _pieces(n: int) -> tuple[int, ...]:
    """Powers of two of at least 16 that hold n columns, 128 at most."""
    pieces, left = [], -(-n // 16) * 16
    while left:
        pieces.append(min(128, 1 << (left.bit_length() - 1)))
        left -= pieces[-1]
    return tuple(pieces)
