"""One block of the encoder: the residual layers around attention and feed-forward network."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from .attention_scbert import ScBertFavorAttention, ScBertSoftmaxAttention
from .blocks_scbert import choose_block, run_block, run_plain
from .configuration_scbert import ScBertConfig
from .lsh_scbert import ScBertLshAttention
from .packing_scbert import in_batches, is_packed
from .positions_scbert import rows_at

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
        # then both residual branches say nothing at first, yet learn: the last map of each is zero
        for last in (self.attention.o_proj, self.output):
            last.starts_at_zero = config.pooling == "cell"

    def __call__(self, hidden_states, *args, **kwargs):
        if not self.gradient_checkpointing or torch.compiler.is_compiling():
            return super().__call__(hidden_states, *args, **kwargs)
        # chosen once, for the recomputation must be of the same kind
        kwargs["block"] = self.choose_block(hidden_states, any(args[1:2]))
        if kwargs["block"] == "plain":
            return super().__call__(hidden_states, *args, **kwargs)
        # the others keep no more than a checkpoint would: checkpointed as well, they would run forward twice
        self.gradient_checkpointing = False
        try:
            return super().__call__(hidden_states, *args, **kwargs)
        finally:
            self.gradient_checkpointing = True

    def choose_block(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> str:
        """Name of the backend that is to run this block."""
        return choose_block(self, hidden_states, output_attentions)

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
            return in_batches(lambda *cells: self.attention(*cells)[0], normed, attention_mask)
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
        block: str | None = None,
    ) -> torch.Tensor:
        """
        Output ``[batch, length, hidden]``, or at ``positions [batch, n]`` alone, ``[batch, n, hidden]``.

        ``block`` names the backend of blocks_scbert.py that computes it; chosen by itself if left out.
        """
        block = block or self.choose_block(hidden_states, output_attentions)
        if positions is not None and (
            is_packed(attention_mask) or isinstance(self.attention, ScBertLshAttention)
        ):
            return rows_at(positions, run_block(block, self, hidden_states, attention_mask))
        if output_attentions:
            return run_plain(self, hidden_states, attention_mask, output_attentions=True)
        queries = None if positions is None else rows_at(positions, hidden_states)
        return run_block(block, self, hidden_states, attention_mask, queries)


class ScBertReversibleLayer(ScBertLayer):
    """The same branches on two residual streams: y1 = x1 + attention(x2); y2 = x2 + feed-forward(y1)."""

    def choose_block(self, hidden_states, output_attentions=False):
        # the branches only are backends' work: the streams are this layer's own
        return "plain"

    def forward(self, hidden_states, attention_mask=None, output_attentions=False, streams=None, block=None):
        """Mean of both streams, and the streams; they start as ``hidden_states``."""
        first, second = (hidden_states.float(),) * 2 if streams is None else streams
        dtype = hidden_states.dtype
        first = first + self.attend(second.to(dtype), attention_mask, output_attentions).float()
        second = second + self.feed_forward(first.to(dtype)).float()
        return ((first + second) / 2).to(dtype), (first, second)
