"""
A whole encoder block in chunks of positions, for inference: no buffer grows with length x features, length x inner
width or length x intermediate, and what one step writes is still in cache when the next one reads it.

The same function as `ScBertLayer.forward`: one pass of norm, keys and values gathers the context of FAVOR+; a second
one takes each chunk from its queries through the output projection and the feed-forward network.
"""

import torch

from .compiled_layer_scbert import compiled_layer, compiled_serves
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
    if layer.training and layer.attention.dropout.p > 0:
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
    queries: torch.Tensor | None = None,
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
    queries
        ``[batch, n, hidden]``: rows of ``hidden_states`` at which alone the output is wanted; by default all.

    Returns
    -------
    ``[batch, length, hidden]`` or ``[batch, n, hidden]``, a new tensor.

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
    if hidden_states.device.type != "cpu":
        return _cells_in_turn(layer, hidden_states, attention_mask, queries)
    if compiled_serves(layer, hidden_states):
        return compiled_layer(layer, hidden_states, attention_mask, chunk_size, queries)
    queries = hidden_states if queries is None else queries
    output = torch.empty_like(queries)
    steps = LayerSteps(layer, hidden_states.dtype)
    chunk_size = chunk_size or steps.chunk_size
    for group in cell_groups(*hidden_states.shape[:2], chunk_size):
        keep = None if attention_mask is None else attention_mask[group].bool()
        table, _ = steps.context(hidden_states[group], keep, chunk_size)
        for start, stop in chunk_bounds(queries.shape[1], chunk_size):
            chunk = queries[group, start:stop]
            joined, *_ = steps.attend(steps.query(chunk), table)
            residual = steps.residual(chunk, steps.quotient(joined))
            torch.add(residual, layer.feed_forward(residual), out=output[group, start:stop])
    return output


def _cells_in_turn(layer, hidden_states, attention_mask, queries) -> torch.Tensor:
    """A few cells at a time, each with its whole sequence."""
    wanted = hidden_states if queries is None else queries
    output = torch.empty_like(wanted)
    for start in range(0, len(output), ACCELERATOR_CELLS):
        group = slice(start, start + ACCELERATOR_CELLS)
        keep = None if attention_mask is None else attention_mask[group]
        rows = None if queries is None else queries[group]
        residual = wanted[group] + layer.attend(hidden_states[group], keep, queries=rows)
        torch.add(residual, layer.feed_forward(residual), out=output[group])
    return output


class LayerSteps:
    """
    The pieces of a FAVOR+ block that work on one chunk of positions.

    Parameters
    ----------
    layer
        `ScBertLayer`.
    dtype
        Of the hidden states; features are computed in at least float32.
    """

    def __init__(self, layer: torch.nn.Module, dtype: torch.dtype):
        config, projection = layer.attention.config, layer.attention.projection_matrix
        self.layer, self.attention = layer, layer.attention
        self.heads, self.width, self.epsilon = (
            config.num_attention_heads,
            config.head_dim,
            config.kernel_epsilon,
        )
        self.features = FeatureChunks(projection, compute_dtype(dtype))
        self.chunk_size = chunk_positions(self.heads, len(projection), projection.device)

    def split(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """``[cells, length, inner]`` to ``[cells * heads, length, width]``, zero where not kept."""
        return joined_heads(x.unflatten(-1, (self.heads, -1)).transpose(1, 2), self.features.dtype, keep)

    def key_value(self, chunk: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a chunk of hidden states."""
        normed = self.layer.attention_norm(chunk)
        return self.split(self.attention.k_proj(normed), keep), self.split(
            self.attention.v_proj(normed), keep
        )

    def query(self, chunk: torch.Tensor) -> torch.Tensor:
        """Queries of a chunk of hidden states."""
        return self.split(self.attention.q_proj(self.layer.attention_norm(chunk)))

    def context(self, hidden_states, keep, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
        """Context table and key maximum of a group of cells, see `KeyContext.finish`."""
        context = KeyContext(self.features, len(hidden_states), self.heads, self.width)
        for start, stop in chunk_bounds(hidden_states.shape[1], chunk_size, keep):
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
        return chunk + self.attention.o_proj(attended.to(self.attention.o_proj.weight.dtype))
