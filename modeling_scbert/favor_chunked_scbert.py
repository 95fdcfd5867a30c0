"""
FAVOR+ attention in chunks of positions, without the random features of the whole sequence in memory.

The same function as `favor_attention_naive` of favor_scbert.py, in chunks that stay in cache:

- key pass: ``context = sum_j phi_k(j) [v_j, 1]``, one [m, dv + 1] table per head, whose last column is the normaliser;
- query pass: ``[numerator, normaliser] = phi_q(i) context``;
- the backward recomputes the features chunk by chunk and mirrors both passes.

The steps on one chunk are in favor_chunks_scbert.py.
"""

import torch

from .favor_chunks_scbert import (
    FeatureChunks,
    KeyContext,
    attend,
    cell_groups,
    centre,
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
    uncentre_gradient,
)


def chunked_state(
    query: torch.Tensor, value: torch.Tensor, projection_matrix: torch.Tensor
) -> list[torch.Tensor]:
    """
    What the forward keeps for the backward, uninitialised.

    Context table [B * H, m, dv + 1], key max [B], query max and normaliser [B, H, Lq]. In half precision also the mean
    value of each head, [B * H, 1, dv], and the output less that, [B, Lq, H, dv]: a gradient of a query is a difference
    of the outputs and of the columns of the table, which an offset that the values share would drown in rounding.
    """
    cells, heads, length, _ = query.shape
    width = value.shape[-1]
    new = torch.empty(0, dtype=compute_dtype(query.dtype), device=query.device).new_empty
    table = new(cells * heads, projection_matrix.shape[0], width + 1)
    state = [table, new(cells), new(cells, heads, length), new(cells, heads, length)]
    if value.dtype != compute_dtype(value.dtype):
        state += [new(cells * heads, 1, width), value.new_empty(cells, length, heads, width)]
    return state


def chunked_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    epsilon: float,
) -> list[torch.Tensor]:
    """Output [B, Lq, H, dv] and the state."""
    cells, heads, length, _ = query.shape
    width, dtype = value.shape[-1], compute_dtype(query.dtype)
    chunk_size = chunk_positions(heads, projection_matrix.shape[0], query.device)
    output = value.new_empty(cells, length, heads, width)
    state = chunked_state(query, value, projection_matrix)
    table, key_max, query_max, normaliser, *centred = state
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
            if centred:
                centred[0][rows] = centre(table[rows], context.mean())
            for start, stop in chunk_bounds(length, chunk_size):
                chunk = joined_heads(query[group, :, start:stop], dtype)
                joined, row_max, _ = attend(features, chunk, table[rows], epsilon)
                quotient = joined[..., :-1] / joined[..., -1:]
                if centred:
                    centred[1][group, start:stop] = _split(quotient, heads)
                    quotient += centred[0][rows]
                output[group, start:stop] = _split(quotient, heads)
                normaliser[group, :, start:stop] = joined[..., -1].view(-1, heads, stop - start)
                query_max[group, :, start:stop] = row_max.view(-1, heads, stop - start)
    return [output, *state]


def chunked_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    output: torch.Tensor,
    state: list[torch.Tensor],
    epsilon: float,
) -> list[torch.Tensor]:
    """Gradients of query, key and value, each stored as [B, L, H, d]."""
    cells, heads, length, _ = query.shape
    dtype = compute_dtype(query.dtype)
    table, key_max, query_max, normaliser, *centred = state
    quotient = centred[1] if centred else output
    chunk_size = chunk_positions(heads, projection_matrix.shape[0], query.device)
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
                whole = (query, grad.transpose(1, 2), quotient.transpose(1, 2))
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
                grads[0][group, start:stop] = _split(dq, heads)
            if centred:
                uncentre_gradient(table_grad, centred[0][rows])
            stabiliser = per_head(key_max[group], heads)
            for start, stop in chunk_bounds(key.shape[2], chunk_size, keep):
                used = None if keep is None else keep[:, start:stop]
                chunk = [joined_heads(x[group, :, start:stop], dtype, used) for x in (key, value)]
                column = keep_column(used, heads)
                dk, dv = key_backward(features, *chunk, column, stabiliser, table_grad, epsilon)
                grads[1][group, start:stop] = _split(dk, heads)
                grads[2][group, start:stop] = _split(dv, heads)
    return grads


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[cells * heads, length, width]`` as ``[cells, length, heads, width]``."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)
