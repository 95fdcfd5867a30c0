"""
FAVOR+ attention without the random features of the whole sequence in memory: the portable engine.

The same function as `favor_attention_naive` of favor_scbert.py, computed in chunks of positions that stay in cache:

- key pass: ``context = sum_j phi_k(j) [v_j, 1]``, one [m, dv + 1] table per head, whose last column is the normaliser;
- query pass: ``[numerator, normaliser] = phi_q(i) context``;
- the backward recomputes the features chunk by chunk and mirrors both passes.

The steps on one chunk are in favor_chunks_scbert.py. Stabilisers are constants to the gradient, here as in the
reference: they cancel in exact arithmetic but for epsilon.
"""

import torch

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
    position_scale,
    query_backward,
)
from .favor_triton_scbert import give_up, triton_backward, triton_forward, triton_serves

# the checkpoint's own copy of this file, loaded as remote code, must not take over the installed one's operators
_NAMESPACE = "scbert" if __name__.startswith("scbert.") else __name__.replace(".", "_").replace("-", "_")


def favor_attention_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    FAVOR+ attention in chunks of positions; differentiable in query, key and value.

    Works under autocast, gradient checkpointing, ``torch.compile`` and ``torch.export`` (one custom operator).

    Parameters
    ----------
    query, key, value
        ``[batch, heads, length, d]`` of one dtype; queries may have another length than keys, values another width.
        Half precisions are computed and accumulated in float32, float64 in float64.
    projection_matrix
        Random features ``[m, d]``; no gradient flows to it.
    attention_mask
        ``[batch, key length]``, true (nonzero) where a key may be attended to. Masked keys contribute nothing to
        values, normaliser, stabiliser or epsilon terms; a cell without any key gets zeros.
    epsilon
        The kernel's additive constant.
    chunk_size
        Positions per chunk; by default chosen from the cache size, see `chunk_positions`.

    Returns
    -------
    ``[batch, heads, query length, value width]`` in the dtype of ``value``; memory layout
    ``[batch, length, heads, width]``, so that joining the heads afterwards copies nothing.

    Examples
    --------
    >>> q = k = v = torch.randn(2, 4, 100, 16)
    >>> favor_attention_chunked(q, k, v, torch.randn(44, 16)).shape
    torch.Size([2, 4, 100, 16])
    """
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
    output, *_ = _favor_forward(
        query, key, value, projection_matrix, attention_mask, epsilon, chunk_size or 0
    )
    return output.transpose(1, 2)


@torch.library.custom_op(f"{_NAMESPACE}::favor_attention", mutates_args=())
def _favor_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    epsilon: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Output [B, Lq, H, dv]; and for the backward: context table [B * H, m, dv + 1], key max [B], query max and normaliser
    [B, H, Lq]. With zero as ``chunk_size`` the cache decides.
    """
    if triton_serves(query, value):
        try:
            return triton_forward(query, key, value, projection_matrix, attention_mask, epsilon)
        except Exception as error:
            # whatever a compiler or driver raises: the portable engine serves every device
            give_up(error)
    cells, heads, length, _ = query.shape
    width, dtype = value.shape[-1], compute_dtype(query.dtype)
    chunk_size = chunk_size or chunk_positions(heads, projection_matrix.shape[0], query.device)
    output = value.new_empty(cells, length, heads, width)
    table, key_max, query_max, normaliser = _empty_state(query, value, projection_matrix)
    with torch.autocast(query.device.type, enabled=False):
        features = FeatureChunks(projection_matrix, dtype)
        for group in cell_groups(cells, max(length, key.shape[2]), chunk_size):
            keep = None if attention_mask is None else attention_mask[group]
            rows = slice(group.start * heads, group.stop * heads)
            context = KeyContext(features, group.stop - group.start, heads, width)
            for start, stop in chunk_bounds(key.shape[2], chunk_size, keep):
                used = None if keep is None else keep[:, start:stop]
                chunk = (joined_heads(x[group, :, start:stop], dtype, used) for x in (key, value))
                context.add(*chunk, keep_column(used, heads))
            table[rows], key_max[group] = context.finish(epsilon)
            for start, stop in chunk_bounds(length, chunk_size):
                chunk = joined_heads(query[group, :, start:stop], dtype)
                joined, row_max, _ = attend(features, chunk, table[rows], epsilon)
                joined = joined.unflatten(0, (-1, heads)).transpose(1, 2)
                output[group, start:stop] = joined[..., :-1] / joined[..., -1:]
                normaliser[group, :, start:stop] = joined[..., -1].mT
                query_max[group, :, start:stop] = row_max.view(-1, heads, stop - start)
    return output, table, key_max, query_max, normaliser


def _empty_state(query, value, projection_matrix) -> tuple[torch.Tensor, ...]:
    """What the forward keeps for the backward: context table, key max, query max, normaliser."""
    cells, heads, length, _ = query.shape
    new = torch.empty(0, dtype=compute_dtype(query.dtype), device=query.device).new_empty
    table = new(cells * heads, projection_matrix.shape[0], value.shape[-1] + 1)
    return table, new(cells), new(cells, heads, length), new(cells, heads, length)


@_favor_forward.register_fake
def _(query, key, value, projection_matrix, attention_mask, epsilon, chunk_size):
    cells, heads, length, _ = query.shape
    output = value.new_empty(cells, length, heads, value.shape[-1])
    return output, *_empty_state(query, value, projection_matrix)


@torch.library.custom_op(f"{_NAMESPACE}::favor_attention_backward", mutates_args=())
def _favor_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    output: torch.Tensor,
    table: torch.Tensor,
    key_max: torch.Tensor,
    query_max: torch.Tensor,
    normaliser: torch.Tensor,
    epsilon: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each stored as [B, L, H, d]."""
    if triton_serves(query, value):
        state = (output, table, key_max, query_max, normaliser)
        return triton_backward(grad, query, key, value, projection_matrix, attention_mask, *state, epsilon)
    cells, heads, length, _ = query.shape
    dtype = compute_dtype(query.dtype)
    chunk_size = chunk_size or chunk_positions(heads, projection_matrix.shape[0], query.device)
    # only keys that no chunk reaches, beyond the last one in use, are left to be zero
    grads = [x.new_empty(cells, x.shape[2], heads, x.shape[3]) for x in (query, key, value)]
    if attention_mask is not None:
        for unreached in grads[1:]:
            unreached.zero_()
    with torch.autocast(query.device.type, enabled=False):
        features = FeatureChunks(projection_matrix, dtype)
        for group in cell_groups(cells, max(length, key.shape[2]), chunk_size):
            keep = None if attention_mask is None else attention_mask[group]
            rows = slice(group.start * heads, group.stop * heads)
            table_grad = torch.zeros_like(table[rows])
            for start, stop in chunk_bounds(length, chunk_size):
                whole = (query, grad.transpose(1, 2), output.transpose(1, 2))
                chunk = [joined_heads(x[group, :, start:stop], dtype) for x in whole]
                saved = [
                    x[group, :, start:stop].reshape(-1, stop - start, 1) for x in (query_max, normaliser)
                ]
                logs, half_square = features.logarithms(chunk[0])
                scale = position_scale(logs, saved[0], half_square)
                joined = joined_gradient(*chunk[1:], saved[1])
                dq = query_backward(
                    features, chunk[0], logs.exp2_(), scale, joined, table[rows], table_grad, epsilon
                )
                grads[0][group, start:stop] = dq.unflatten(0, (-1, heads)).transpose(1, 2)
            stabiliser = per_head(key_max[group], heads)
            for start, stop in chunk_bounds(key.shape[2], chunk_size, keep):
                used = None if keep is None else keep[:, start:stop]
                chunk = [joined_heads(x[group, :, start:stop], dtype, used) for x in (key, value)]
                column = keep_column(used, heads)
                dk, dv = key_backward(features, *chunk, column, stabiliser, table_grad, epsilon)
                grads[1][group, start:stop] = dk.unflatten(0, (-1, heads)).transpose(1, 2)
                grads[2][group, start:stop] = dv.unflatten(0, (-1, heads)).transpose(1, 2)
    return tuple(grads)


@_favor_backward.register_fake
def _(grad, query, key, value, *args):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, projection_matrix, attention_mask, epsilon, chunk_size = inputs
    ctx.save_for_backward(query, key, value, projection_matrix, attention_mask, *output)
    ctx.epsilon, ctx.chunk_size = epsilon, chunk_size


def _autograd_backward(ctx, grad, *_):
    grads = _favor_backward(grad, *ctx.saved_tensors, ctx.epsilon, ctx.chunk_size)
    return *(x.transpose(1, 2) for x in grads), None, None, None, None


_favor_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
