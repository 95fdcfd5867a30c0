"""
A whole encoder block in chunks of positions, for training: it keeps its input and the context of FAVOR+, and recomputes
the rest chunk by chunk in the backward, where each chunk's intermediates are still in cache.

Gradients are those of `ScBertLayer.forward`. Memory is that of gradient checkpointing, without its second forward: the
context is not recomputed, and a chunk's features serve both its output and its gradient.
"""

from contextlib import nullcontext

import torch

from .chunked_inference_scbert import LayerSteps
from .compiled_layer_scbert import compiled_layer, compiled_serves
from .favor_chunks_scbert import (
    cell_groups,
    chunk_bounds,
    joined_gradient,
    keep_column,
    key_backward,
    per_head,
    query_backward,
)

# queries of a batch up to this size are left to plain autograd: with little to compute, calls cost more than memory
KEPT_BYTES = 16 << 20


def trains_in_chunks(layer: torch.nn.Module, hidden_states: torch.Tensor, output_attentions: bool) -> bool:
    """
    Whether `train_in_chunks` is to replace a layer's forward: FAVOR+ on a CPU, no dropout, nothing traced, and compiled
    operators, or intermediates too large to be kept at leisure, or not to be kept at all (gradient checkpointing).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    if not hasattr(layer.attention, "projection_matrix") or output_attentions:
        return False
    if hidden_states.device.type != "cpu":
        return False
    if layer.training and (layer.dropout.p > 0 or layer.attention.dropout.p > 0):
        return False
    if compiled_serves(layer, hidden_states):
        return True
    inner_bytes = (
        hidden_states[..., 0].numel() * layer.attention.q_proj.weight.shape[0] * hidden_states.itemsize
    )
    return layer.gradient_checkpointing or layer.keeps_nothing or inner_bytes >= KEPT_BYTES


def train_in_chunks(
    layer: torch.nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Output of a FAVOR+ `ScBertLayer`, differentiable in its input and weights, that keeps next to nothing.

    Parameters
    ----------
    layer
        The block; its submodules are called, in the forward and again in the backward.
    hidden_states
        ``[batch, length, hidden]``.
    attention_mask
        ``[batch, length]``, true where a position may be attended to.
    chunk_size
        Positions per chunk; by default chosen from the cache size.
    queries
        ``[batch, n, hidden]``: rows of ``hidden_states`` at which alone the output is wanted; by default all.

    Returns
    -------
    ``[batch, length, hidden]``, or ``[batch, n, hidden]``.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> layer = ScBertLayer(ScBertConfig(hidden_size=32), 0)
    >>> _ = layer.attention.projection_matrix.copy_(layer.attention.initial_projection())
    >>> train_in_chunks(layer, torch.randn(1, 50, 32)).sum().backward()
    >>> layer.output.weight.grad.shape
    torch.Size([32, 800])
    """
    if compiled_serves(layer, hidden_states):
        return compiled_layer(layer, hidden_states, attention_mask, chunk_size, queries)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    return _LayerInChunks.apply(layer, hidden_states, attention_mask, chunk_size, queries, *weights)


class _LayerInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, hidden_states, attention_mask, chunk_size, queries, *weights):
        steps = LayerSteps(layer, hidden_states.dtype)
        chunk_size = chunk_size or steps.chunk_size
        keep = None if attention_mask is None else attention_mask.bool()
        rows = hidden_states if queries is None else queries
        output = torch.empty_like(rows)
        tables = []
        for group in cell_groups(*hidden_states.shape[:2], chunk_size):
            used = None if keep is None else keep[group]
            table, key_max = steps.context(hidden_states[group], used, chunk_size)
            tables += [table, key_max]
            for start, stop in chunk_bounds(rows.shape[1], chunk_size):
                chunk = rows[group, start:stop]
                joined, *_ = steps.attend(steps.query(chunk), table)
                residual = steps.residual(chunk, steps.quotient(joined))
                torch.add(residual, layer.feed_forward(residual), out=output[group, start:stop])
        ctx.save_for_backward(hidden_states, queries, keep, *tables)
        ctx.layer, ctx.chunk_size = layer, chunk_size
        enabled = torch.is_autocast_enabled("cpu")
        ctx.autocast = torch.get_autocast_dtype("cpu") if enabled else None
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, queries, keep, *tables = ctx.saved_tensors
        weights = [weight for weight in ctx.layer.parameters() if weight.requires_grad]
        backward = _LayerBackward(ctx.layer, weights, hidden_states, queries)
        autocast = nullcontext() if ctx.autocast is None else torch.autocast("cpu", ctx.autocast)
        with autocast:
            for index, group in enumerate(cell_groups(*hidden_states.shape[:2], ctx.chunk_size)):
                used = None if keep is None else keep[group]
                table, key_max = tables[2 * index : 2 * index + 2]
                backward.group(group, grad, used, table, key_max, ctx.chunk_size)
        hidden_grad = backward.hidden_grad if ctx.needs_input_grad[1] else None
        query_grad = None if queries is None else backward.query_grad
        return None, hidden_grad, None, None, query_grad, *backward.weight_grads


class _LayerBackward:
    """Gradients of a block's weights and input, gathered chunk by chunk."""

    def __init__(self, layer: torch.nn.Module, weights: list[torch.Tensor], hidden_states, queries=None):
        self.steps = LayerSteps(layer, hidden_states.dtype)
        self.layer, self.weights, self.hidden_states = layer, weights, hidden_states
        self.queries = hidden_states if queries is None else queries
        self.hidden_grad = torch.zeros_like(hidden_states)
        self.query_grad = self.hidden_grad if queries is None else torch.zeros_like(queries)
        self.weight_grads = [torch.zeros_like(weight) for weight in weights]

    def group(self, group, grad, keep, table, key_max, chunk_size) -> None:
        """Backward of a group of cells: first what depends on queries, which completes the context's gradient."""
        table_grad = torch.zeros_like(table)
        for start, stop in chunk_bounds(self.queries.shape[1], chunk_size):
            self._query_chunk((group, slice(start, stop)), grad[group, start:stop], table, table_grad)
        stabiliser = per_head(key_max, self.steps.heads)
        for start, stop in chunk_bounds(self.hidden_states.shape[1], chunk_size, keep):
            used = None if keep is None else keep[:, start:stop]
            self._key_chunk((group, slice(start, stop)), used, stabiliser, table_grad)

    def _query_chunk(self, at, grad, table, table_grad) -> None:
        steps, total = self.steps, self.query_grad[at]
        with torch.enable_grad():
            chunk = self.queries[at].detach().requires_grad_()
            query = steps.query(chunk)
        joined, _, scale = steps.attend(query.detach(), table)
        normaliser = joined[..., -1:].clone()
        with torch.enable_grad():
            attended = steps.quotient(joined).requires_grad_()
            residual = steps.residual(chunk, attended)
            output = residual + self.layer.feed_forward(residual)
        (attended_grad,) = self._gather(total, chunk, [output], [grad], [attended])
        with torch.autocast("cpu", enabled=False):
            joined = joined_gradient(steps.split(attended_grad), steps.split(attended.detach()), normaliser)
            exponentials = steps.features.current
            query_grad = query_backward(
                steps.features,
                query.detach(),
                exponentials,
                scale,
                joined,
                table,
                table_grad,
                steps.epsilon,
            )
        self._gather(total, chunk, [query], [query_grad])

    def _key_chunk(self, at, keep, stabiliser, table_grad) -> None:
        steps = self.steps
        with torch.enable_grad():
            chunk = self.hidden_states[at].detach().requires_grad_()
            pair = steps.key_value(chunk, keep)
        with torch.autocast("cpu", enabled=False):
            key, value = (x.detach() for x in pair)
            column = keep_column(keep, steps.heads)
            grads = key_backward(steps.features, key, value, column, stabiliser, table_grad, steps.epsilon)
        self._gather(self.hidden_grad[at], chunk, pair, grads)

    def _gather(self, total, chunk, outputs, grads, others=()) -> tuple[torch.Tensor, ...]:
        """Add a chunk's share to the gradients of its input and of the weights; return those of ``others``."""
        found = torch.autograd.grad(outputs, [*others, chunk, *self.weights], grads, allow_unused=True)
        total += found[len(others)]
        for gathered, share in zip(self.weight_grads, found[len(others) + 1 :], strict=True):
            if share is not None:
                gathered += share
        return found[: len(others)]
