"""
A whole encoder block in chunks of positions, for inference: no buffer grows with length x features, length x inner
width or length x intermediate, and what one step writes is still in cache when the next one reads it.

The same function as `ScBertLayer.forward`: one pass of norm, keys and values gathers the context of FAVOR+; a second
one takes each chunk from its queries through the output projection and the feed-forward network.
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
    joined_heads,
    keep_column,
)

# cells a layer takes at once on an accelerator, where kernels work on whole sequences
ACCELERATOR_CELLS = 8


def runs_in_chunks(layer: torch.nn.Module, hidden_states: torch.Tensor, output_attentions: bool) -> bool:
    """Whether `layer_in_chunks` may replace a layer's forward: FAVOR+, no gradient to keep, nothing traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or output_attentions:
        return False
    if not hasattr(layer.attention, "projection_matrix"):
        return False
    # a frozen layer under trained ones, in fine-tuning, keeps nothing for the backward either
    trained = hidden_states.requires_grad or any(weight.requires_grad for weight in layer.parameters())
    return not (torch.is_grad_enabled() and trained)


@torch.no_grad()
def layer_in_chunks(
    layer: torch.nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Output of a FAVOR+ `ScBertLayer`, computed chunk by chunk.

    Parameters
    ----------
    layer
        The block; its submodules are called, so that adapters, hooks and autocast keep working.
    hidden_states
        ``[batch, length, hidden]``.
    attention_mask
        ``[batch, length]``, true where a position may be attended to.
    chunk_size
        Positions per chunk; by default chosen from the cache size.

    Returns
    -------
    ``[batch, length, hidden]``, a new tensor.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.modeling_scbert import ScBertLayer
    >>> layer = ScBertLayer(ScBertConfig(hidden_size=32), 0)
    >>> layer.attention.projection_matrix.copy_(layer.attention.initial_projection()).shape
    torch.Size([266, 64])
    >>> layer_in_chunks(layer, torch.randn(1, 50, 32)).shape
    torch.Size([1, 50, 32])
    """
    output = torch.empty_like(hidden_states)
    if hidden_states.device.type != "cpu":
        for start in range(0, len(output), ACCELERATOR_CELLS):
            group = slice(start, start + ACCELERATOR_CELLS)
            keep = None if attention_mask is None else attention_mask[group]
            residual = hidden_states[group] + layer.attend(hidden_states[group], keep)
            torch.add(residual, layer.feed_forward(residual), out=output[group])
        return output
    attention = layer.attention
    projection = attention.projection_matrix
    heads = attention.config.num_attention_heads
    chunk_size = chunk_size or chunk_positions(heads, len(projection), hidden_states.device)
    features = FeatureChunks(projection, compute_dtype(hidden_states.dtype))
    for group in cell_groups(*hidden_states.shape[:2], chunk_size):
        keep = None if attention_mask is None else attention_mask[group].bool()
        _group_in_chunks(layer, features, hidden_states[group], keep, chunk_size, output[group])
    return output


def _group_in_chunks(layer, features, hidden_states, keep, chunk_size, output):
    attention, epsilon = layer.attention, layer.attention.config.kernel_epsilon
    cells, length, _ = hidden_states.shape
    heads, width = attention.config.num_attention_heads, attention.config.head_dim

    def split(x, keep=None):
        return joined_heads(x.unflatten(-1, (heads, width)).transpose(1, 2), features.dtype, keep)

    context = KeyContext(features, cells, heads, width)
    for start, stop in chunk_bounds(length, chunk_size, keep):
        chunk_keep = None if keep is None else keep[:, start:stop]
        normed = layer.attention_norm(hidden_states[:, start:stop])
        key, value = (split(project(normed), chunk_keep) for project in (attention.k_proj, attention.v_proj))
        with torch.autocast("cpu", enabled=False):
            context.add(key, value, keep_column(chunk_keep, heads))
    table, _ = context.finish(epsilon)

    for start, stop in chunk_bounds(length, chunk_size):
        chunk = hidden_states[:, start:stop]
        query = attention.q_proj(layer.attention_norm(chunk))
        with torch.autocast("cpu", enabled=False):
            joined, _ = attend(features, split(query), table, epsilon)
            joined = joined.unflatten(0, (cells, heads)).transpose(1, 2)
            attended = (joined[..., :-1] / joined[..., -1:]).flatten(-2).to(query.dtype)
        chunk = chunk + attention.o_proj(attended)
        torch.add(chunk, layer.feed_forward(chunk), out=output[:, start:stop])
