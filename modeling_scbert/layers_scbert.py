"""One block of the encoder: exact attention beside the approximate ones, and the residual layers around them."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from .chunked_inference_scbert import layer_in_chunks, runs_in_chunks
from .chunked_training_scbert import train_in_chunks, trains_in_chunks
from .configuration_scbert import ScBertConfig
from .favor_scbert import ScBertFavorAttention
from .lsh_scbert import ScBertLshAttention
from .packing_scbert import is_packed, per_cell
from .positions_scbert import rows_at


class ScBertSoftmaxAttention(nn.Module):
    """Exact multi-head attention, for short sequences and as the yardstick of the approximate ones."""

    def __init__(self, config: ScBertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        queries: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = ScBertFavorAttention.project(self, hidden_states, queries)
        keep = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        if output_attentions:
            scores = query @ key.mT * self.config.head_dim**-0.5
            if keep is not None:
                scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            context = nn.functional.dropout(weights, dropout) @ value
        else:
            weights = None
            context = nn.functional.scaled_dot_product_attention(query, key, value, keep, dropout)
        return self.o_proj(context.transpose(1, 2).flatten(-2)), weights


ATTENTION_CLASSES = {
    "favor": ScBertFavorAttention,
    "softmax": ScBertSoftmaxAttention,
    "lsh": ScBertLshAttention,
}


class ScBertLayer(GradientCheckpointingLayer):
    """Pre-LayerNorm block: x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, config: ScBertConfig, layer_idx: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ATTENTION_CLASSES[config.attention_type](config, layer_idx)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.keeps_nothing = False

    def __call__(self, hidden_states, *args, **kwargs):
        checkpointed = self.gradient_checkpointing and not isinstance(self, ScBertReversibleLayer)
        if not (checkpointed and trains_in_chunks(self, hidden_states, any(args[1:2]))):
            return super().__call__(hidden_states, *args, **kwargs)
        # in chunks, a layer keeps no more than a checkpoint would: checkpointed as well, it would run forward twice
        self.gradient_checkpointing, self.keeps_nothing = False, True
        try:
            return super().__call__(hidden_states, *args, **kwargs)
        finally:
            self.gradient_checkpointing, self.keeps_nothing = True, False

    def attend(
        self, hidden_states, attention_mask=None, output_attentions=False, queries=None
    ) -> torch.Tensor:
        """First residual branch, norm and attention: ``[batch, length, hidden]``, or the shape of ``queries``."""
        normed = self.attention_norm(hidden_states)
        if is_packed(attention_mask):
            if output_attentions:
                raise ValueError(
                    "Packed cells have no attention matrix of the row: pad them to see attentions."
                )
            return per_cell(lambda cell: self.attention(cell)[0], normed, attention_mask)
        if queries is not None:
            return self.attention(normed, attention_mask, queries=self.attention_norm(queries))[0]
        return self.attention(normed, attention_mask, output_attentions)[0]

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Second residual branch, norm and position-wise network; same shapes."""
        size = self.chunk_size_feed_forward
        if size and hidden_states.shape[1] % size:
            # some positions of a sequence, or a chunk of it: transformers takes whole multiples only
            return torch.cat([self._feed_forward(chunk) for chunk in hidden_states.split(size, 1)], 1)
        return apply_chunking_to_forward(self._feed_forward, size, 1, hidden_states)

    def _feed_forward(self, hidden_states):
        hidden_states = self.activation(self.intermediate(self.ffn_norm(hidden_states)))
        return self.dropout(self.output(hidden_states))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output ``[batch, length, hidden]``, or at ``positions [batch, n]`` alone, ``[batch, n, hidden]``."""
        if positions is not None:
            return self._at(positions, hidden_states, attention_mask)
        if runs_in_chunks(self, hidden_states, output_attentions):
            return self._in_chunks(layer_in_chunks, hidden_states, attention_mask)
        if trains_in_chunks(self, hidden_states, output_attentions):
            return self._in_chunks(train_in_chunks, hidden_states, attention_mask)
        hidden_states = hidden_states + self.attend(hidden_states, attention_mask, output_attentions)
        return hidden_states + self.feed_forward(hidden_states)

    def _at(self, positions, hidden_states, attention_mask):
        if is_packed(attention_mask) or isinstance(self.attention, ScBertLshAttention):
            return rows_at(positions, self.forward(hidden_states, attention_mask))
        queries = rows_at(positions, hidden_states)
        if runs_in_chunks(self, hidden_states, False):
            return layer_in_chunks(self, hidden_states, attention_mask, queries=queries)
        if trains_in_chunks(self, hidden_states, False):
            return train_in_chunks(self, hidden_states, attention_mask, queries=queries)
        residual = queries + self.attend(hidden_states, attention_mask, queries=queries)
        return residual + self.feed_forward(residual)

    def _in_chunks(self, function, hidden_states, attention_mask):
        if is_packed(attention_mask):
            return per_cell(lambda cell: function(self, cell), hidden_states, attention_mask)
        return function(self, hidden_states, attention_mask)


class ScBertReversibleLayer(ScBertLayer):
    """The same branches on two residual streams: y1 = x1 + attention(x2); y2 = x2 + feed-forward(y1)."""

    def forward(self, hidden_states, attention_mask=None, output_attentions=False, streams=None):
        """Mean of both streams, and the streams; they start as ``hidden_states``."""
        first, second = (hidden_states.float(),) * 2 if streams is None else streams
        dtype = hidden_states.dtype
        first = first + self.attend(second.to(dtype), attention_mask, output_attentions).float()
        second = second + self.feed_forward(first.to(dtype)).float()
        return ((first + second) / 2).to(dtype), (first, second)
