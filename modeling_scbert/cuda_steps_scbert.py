"""
Steps of a FAVOR+ block on CUDA, forward and backward; cuda_layer_scbert.py makes one differentiable operation of them.

They launch on the current device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch.nn import functional as F

from .favor_tiles_scbert import powers_of_two
from .favor_triton_scbert import FavorLaunches, capability_of, processors_of, triton_state
from .feed_forward_kernels_scbert import (
    feed_forward_kernel,
    hidden_gradient_kernel,
    norm_gradient_kernel,
    norm_kernel,
)
from .published_layer_scbert import WEIGHTS

# rows of a program of the norms
NORM_ROWS = 16


class Settings(NamedTuple):
    """What a block is told beside tensors."""

    dtype: torch.dtype
    heads: int
    epsilon: float
    norm_epsilon: float


class CudaSteps:
    """A block's weights as the kernels take them, and its steps on some cells."""

    def __init__(self, settings: Settings, projection: torch.Tensor, weights: tuple[torch.Tensor, ...]):
        self.weights, self.projection = dict(zip(WEIGHTS, weights, strict=True)), projection
        self.dtype, self.heads, self.epsilon, self.norm_epsilon = settings
        cast = {name: weight.to(self.dtype) for name, weight in self.weights.items()}
        self.qkv = torch.cat([cast[f"attention.{x}_proj.weight"] for x in "qkv"])
        self.out = cast["attention.o_proj.weight"]
        self.hidden, self.inner = self.out.shape
        self.block = max(16, triton.next_power_of_2(self.hidden))
        # both with the hidden size inside
        self.w1, self.w2 = cast["intermediate.weight"].contiguous(), cast["output.weight"].T.contiguous()
        device = self.out.device
        wide = capability_of(device)[0] in (9, 10)
        self.tiles = {
            "C": self.hidden,
            "PIECES": powers_of_two(self.hidden, 128),
            "INNER": len(self.w1),
            "BLOCK_N": 128 if wide else 64,
            "BLOCK_I": 64 if wide else 32,
            "STAGES": 2,
            "PRECISION": "tf32x3" if device.type == "cuda" else "ieee",
            "num_warps": 8,
        }

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, hidden, keep, queries, output) -> list[torch.Tensor]:
        """Writes the output; returns the context's tables."""
        launches = self.launches(*self.project(hidden, queries), keep)
        state = triton_state(launches.query, launches.value, launches.projection)
        launches.table(launches.sum_keys(), state, keys=True)
        launches.apply_queries(state)
        attended, bias = self.attended(state)
        self.feed_forward(hidden if queries is None else queries, attended, bias, output)
        return state[1:7]

    def project(self, hidden, queries):
        """Queries, keys and values ``[cells, heads, length, d]``, of one product where all rows are queries."""
        normed = self.norm(hidden, "attention_norm")
        if queries is None:
            return self.split(F.linear(normed, self.qkv), 3)
        query = F.linear(self.norm(queries, "attention_norm"), self.qkv[: self.inner])
        return *self.split(query, 1), *self.split(F.linear(normed, self.qkv[self.inner :]), 2)

    def split(self, joint: torch.Tensor, count: int) -> list[torch.Tensor]:
        return [x.transpose(1, 2) for x in joint.unflatten(-1, (count, self.heads, -1)).unbind(2)]

    def launches(self, query, key, value, keep) -> FavorLaunches:
        return FavorLaunches(query, key, value, self.projection, keep, self.epsilon)

    def attended(self, state) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention's branch less its bias, and the bias of each cell ``[cells, hidden]``."""
        centred, mean = state[0].flatten(-2), state[5].view(len(state[0]), self.inner)
        weight, bias = (self.weights[f"attention.o_proj.{kind}"].float() for kind in ("weight", "bias"))
        return F.linear(centred, self.out), torch.addmm(bias, mean, weight.T)

    def norm(self, x, name, attended=None, bias=None):
        """Normed rows in the kernels' dtype; with a branch also the rows to which it was added."""
        branch = attended is not None
        weights = [self.weights[f"{name}.{kind}"] for kind in ("weight", "bias")]
        normed = torch.empty_like(x, dtype=self.dtype)
        residual = torch.empty_like(x) if branch else normed
        tokens = x[..., 0].numel()
        norm_kernel[-(-tokens // NORM_ROWS),](
            *(x.contiguous(), attended if branch else x, bias if branch else weights[0], *weights),
            *(normed, residual, x.shape[1], tokens, self.norm_epsilon),
            C=self.hidden,
            BLOCK_C=self.block,
            BLOCK_N=NORM_ROWS,
            HAS_BRANCH=branch,
        )
        return (normed, residual) if branch else normed

    def feed_forward(self, rows, attended, bias, output) -> None:
        """Attention's branch added, the second branch computed and added."""
        weights, tokens = self.weights, rows[..., 0].numel()
        feed_forward_kernel[-(-tokens // self.tiles["BLOCK_N"]),](
            *(rows.contiguous(), attended, bias, weights["ffn_norm.weight"], weights["ffn_norm.bias"]),
            *(self.w1, weights["intermediate.bias"], self.w2, weights["output.bias"], output),
            *(rows.shape[1], tokens, self.norm_epsilon),
            **self.tiles,
        )

    # ---- backward ---------------------------------------------------------------------------------------------------

    def backward(self, hidden, keep, queries, grad, tables, grads, hidden_grad, query_grad) -> None:
        """Adds to the weights' gradients, writes those of the rows."""
        query, key, value = self.project(hidden, queries)
        launches = self.launches(query, key, value, keep)
        state = triton_state(query, value, launches.projection)
        state[1:7] = tables
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
        self.project_backward(hidden, queries, joint, found[0], stream_grad, grads, hidden_grad, query_grad)

    def feed_forward_backward(self, rows, state, grad, grads) -> torch.Tensor:
        """Gradient of the residual stream between the branches."""
        normed, residual = self.norm(rows, "ffn_norm", *self.attended(state))
        half = grad.to(self.dtype)
        tokens = rows[..., 0].numel()
        active, inner_grad = (half.new_empty(*half.shape[:-1], len(self.w1)) for _ in range(2))
        hidden_gradient_kernel[-(-tokens // self.tiles["BLOCK_N"]),](
            *(normed, half, self.w1, self.weights["intermediate.bias"], self.w2, active, inner_grad, tokens),
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
        normed = self.norm(hidden, "attention_norm")
        names, weight, residual_grad = [f"attention.{x}_proj.weight" for x in "qkv"], self.qkv, stream_grad
        if queries is not None:
            query_proj = query_proj.flatten(2)
            query_normed = self.norm(queries, "attention_norm")
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
        tokens = x[..., 0].numel()
        programs = min(-(-tokens // NORM_ROWS), 4 * processors_of(x.device))
        parts = torch.empty(2, programs, self.hidden, dtype=torch.float32, device=x.device)
        norm_gradient_kernel[programs,](
            *(x.contiguous(), normed_grad, normed_grad if residual_grad is None else residual_grad),
            *(self.weights[f"{name}.weight"], x_grad, *parts, tokens, self.norm_epsilon),
            C=self.hidden,
            BLOCK_C=self.block,
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
