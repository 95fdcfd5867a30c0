"""
A whole FAVOR+ block in chunks of positions: no buffer grows with length x features, length x inner width or length x
intermediate width, and what one step writes is still in cache when the next one reads it.

The same function as the plain block. One pass of norm, keys and values gathers the context of FAVOR+; a second one
takes each chunk from its queries through the output projection and the feed-forward network. In training a block keeps
its input and the context, and recomputes the rest chunk by chunk in the backward: the memory of gradient checkpointing
without its second forward, for a chunk's features serve both its output and its gradient.
"""

from contextlib import nullcontext

import torch
from torch import nn

from .favor_chunks_scbert import (
    FeatureChunks,
    KeyContext,
    attend,
    cell_groups,
    chunk_bounds,
    chunk_positions,
    compute_dtype,
    joined_gradient,
    joined_heads,
    keep_column,
    key_backward,
    per_head,
    query_backward,
)


def is_trained(layer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a gradient will be asked for; a frozen layer under trained ones, in fine-tuning, needs none."""
    if not torch.is_grad_enabled():
        return False
    return hidden_states.requires_grad or any(weight.requires_grad for weight in layer.parameters())


def chunked_supports(layer: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why a FAVOR+ block cannot run in chunks, if it cannot."""
    if hidden_states.device.type != "cpu":
        return "it is for CPUs"
    # an adapter's too: what the backward recomputes would be dropped anew
    active = [x for x in layer.modules() if isinstance(x, nn.Dropout) and x.training and x.p > 0]
    if layer.attention.dropout in active or (active and is_trained(layer, hidden_states)):
        return "dropout is active"
    return None


def run_chunked(layer, hidden_states, attention_mask=None, queries=None) -> torch.Tensor:
    """
    A block's output chunk by chunk, see `run_block` of blocks_scbert.py; differentiable in its input and weights.

    The block's submodules are called (in training again in the backward), so that adapters, hooks and autocast keep
    working.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> layer = ScBertLayer(ScBertConfig(hidden_size=32), 0)
    >>> run_chunked(layer, torch.randn(1, 50, 32)).sum().backward()
    >>> layer.output.weight.grad.shape
    torch.Size([32, 800])
    """
    if is_trained(layer, hidden_states):
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        return _ChunkedLayer.apply(layer, hidden_states, attention_mask, queries, *weights)
    with torch.no_grad():
        return LayerSteps(layer, hidden_states.dtype).forward(hidden_states, attention_mask, queries)


class LayerSteps:
    """
    The pieces of a FAVOR+ block that work on one chunk of positions, and the forward pass made of them.

    Features are computed in the dtype of the hidden states, and at least in float32.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        config, projection = layer.attention.config, layer.attention.projection_matrix
        self.layer, self.attention = layer, layer.attention
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.epsilon = config.kernel_epsilon
        self.features = FeatureChunks(projection, compute_dtype(dtype))
        self.chunk_size = chunk_positions(self.heads, len(projection), projection.device)

    def forward(self, hidden_states, attention_mask, queries, kept: list | None = None) -> torch.Tensor:
        """The block's output; context table and key maximum of each group of cells are appended to ``kept``."""
        queries = hidden_states if queries is None else queries
        output = torch.empty_like(queries)
        for group in cell_groups(*hidden_states.shape[:2], self.chunk_size):
            keep = None if attention_mask is None else attention_mask[group].bool()
            if keep is not None and keep.all():
                # cells of one length: nothing to mask
                keep = None
            table, key_max = self.context(hidden_states[group], keep)
            if kept is not None:
                kept += [table, key_max]
            for start, stop in chunk_bounds(queries.shape[1], self.chunk_size):
                chunk = queries[group, start:stop]
                joined, *_ = self.attend(self.query(chunk), table)
                residual = self.residual(chunk, self.quotient(joined))
                torch.add(residual, self.layer.feed_forward(residual), out=output[group, start:stop])
        return output

    def split(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """``[cells, length, inner]`` to ``[cells * heads, length, width]``, zero where not kept."""
        return joined_heads(x.unflatten(-1, (self.heads, -1)).transpose(1, 2), self.features.dtype, keep)

    def key_value(self, chunk: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a chunk of hidden states."""
        normed = self.layer.attention_norm(chunk)
        return tuple(
            self.split(proj(normed), keep) for proj in (self.attention.k_proj, self.attention.v_proj)
        )

    def query(self, chunk: torch.Tensor) -> torch.Tensor:
        """Queries of a chunk of hidden states."""
        return self.split(self.attention.q_proj(self.layer.attention_norm(chunk)))

    def context(self, hidden_states, keep) -> tuple[torch.Tensor, torch.Tensor]:
        """Context table and key maximum of a group of cells, see `KeyContext.finish`."""
        context = KeyContext(self.features, len(hidden_states), self.heads, self.width)
        for start, stop in chunk_bounds(hidden_states.shape[1], self.chunk_size, keep):
            used = None if keep is None else keep[:, start:stop]
            key, value = self.key_value(hidden_states[:, start:stop], used)
            with torch.autocast("cpu", enabled=False):
                context.add(key, value, keep_column(used, self.heads))
        return context.finish(self.epsilon)

    def attend(self, query: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See favor_chunks_scbert.attend."""
        with torch.autocast("cpu", enabled=False):
            return attend(self.features, query, table, self.epsilon)

    def quotient(self, joined: torch.Tensor) -> torch.Tensor:
        """Numerator over normaliser, heads side by side: ``[cells, length, inner]``."""
        joined = joined.unflatten(0, (-1, self.heads)).transpose(1, 2)
        return (joined[..., :-1] / joined[..., -1:]).flatten(-2)

    def residual(self, chunk: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The chunk after the first residual branch."""
        return chunk + self.attention.o_proj(attended.to(chunk.dtype))


class _ChunkedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, hidden_states, attention_mask, queries, *weights):
        keep = None if attention_mask is None else attention_mask.bool()
        steps, tables = LayerSteps(layer, hidden_states.dtype), []
        output = steps.forward(hidden_states, keep, queries, tables)
        ctx.save_for_backward(hidden_states, queries, keep, *tables)
        ctx.layer, ctx.chunk_size = layer, steps.chunk_size
        enabled = torch.is_autocast_enabled("cpu")
        ctx.autocast = torch.get_autocast_dtype("cpu") if enabled else None
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, queries, keep, *tables = ctx.saved_tensors
        weights = [weight for weight in ctx.layer.parameters() if weight.requires_grad]
        backward = _LayerBackward(ctx.layer, ctx.chunk_size, weights, hidden_states, queries)
        autocast = nullcontext() if ctx.autocast is None else torch.autocast("cpu", ctx.autocast)
        with autocast:
            for index, group in enumerate(cell_groups(*hidden_states.shape[:2], ctx.chunk_size)):
                used = None if keep is None else keep[group]
                table, key_max = tables[2 * index : 2 * index + 2]
                backward.group(group, grad, used, table, key_max)
        hidden_grad = backward.hidden_grad if ctx.needs_input_grad[1] else None
        query_grad = None if queries is None else backward.query_grad
        return None, hidden_grad, None, query_grad, *backward.weight_grads


class _LayerBackward:
    """Gradients of a block's weights and input, gathered chunk by chunk."""

    def __init__(self, layer: nn.Module, chunk_size: int, weights: list, hidden_states, queries=None):
        self.steps = LayerSteps(layer, hidden_states.dtype)
        # the forward's, which grouped the tables by it
        self.chunk_size = chunk_size
        self.layer, self.weights, self.hidden_states = layer, weights, hidden_states
        self.queries = hidden_states if queries is None else queries
        self.hidden_grad = torch.zeros_like(hidden_states)
        self.query_grad = self.hidden_grad if queries is None else torch.zeros_like(queries)
        self.weight_grads = [torch.zeros_like(weight) for weight in weights]

    def group(self, group, grad, keep, table, key_max) -> None:
        """Backward of a group of cells: first what depends on queries, which completes the context's gradient."""
        table_grad = torch.zeros_like(table)
        for start, stop in chunk_bounds(self.queries.shape[1], self.chunk_size):
            self._query_chunk((group, slice(start, stop)), grad[group, start:stop], table, table_grad)
        stabiliser = per_head(key_max, self.steps.heads)
        for start, stop in chunk_bounds(self.hidden_states.shape[1], self.chunk_size, keep):
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
