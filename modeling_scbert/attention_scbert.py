"""Attention modules: exact attention (softmax) and FAVOR+; that of Reformer is in lsh_scbert.py."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_scbert import ScBertConfig
from .favor_engine_scbert import favor_attention
from .favor_scbert import draw_projection, favor_attention_weights


class ScBertProjections(nn.Module):
    """What exact attention and FAVOR+ share: projections of hidden states to heads, and back."""

    def __init__(self, config: ScBertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_size, config.hidden_size)

    def project(
        self, hidden_states: torch.Tensor, queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values ``[batch, heads, length, d]`` of normalised hidden states."""
        sources = (hidden_states if queries is None else queries, hidden_states, hidden_states)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            proj(source).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for proj, source in zip(projections, sources, strict=True)
        )
        return query, key, value


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **_
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attn_implementation="eager"``: the matrix of weights, and their sums over values [batch, length, heads, d]."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2), weights


class ScBertSoftmaxAttention(ScBertProjections):
    """Exact multi-head attention, for short sequences and as the yardstick of the approximate ones."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        queries: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, queries)
        keep = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        name = self.config._attn_implementation or "sdpa"
        # transformers' sdpa takes no empty batch; a traced graph must not depend on the number of cells
        empty = not torch.compiler.is_compiling() and not len(query)
        # other implementations have no weights to show
        eager = output_attentions or name == "eager" or empty
        attend = eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[name]
        context, weights = attend(
            self,
            query,
            key,
            value,
            keep,
            dropout=dropout,
            scaling=self.config.head_dim**-0.5,
            is_causal=False,
        )
        return self.o_proj(context.flatten(-2)), weights


class ScBertFavorAttention(ScBertProjections):
    """Multi-head FAVOR+ attention; every head of a layer shares one random projection."""

    def __init__(self, config: ScBertConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        # there are no probabilities to drop: as in Performer, the attention's output is
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.register_buffer("projection_matrix", self.initial_projection().to(self.o_proj.weight.device))

    def start_weights(self) -> None:
        """The random features; weights start as in every model of transformers."""
        init.copy_(self.projection_matrix, self.initial_projection())

    def initial_projection(self) -> torch.Tensor:
        """The layer's first random features; a pure function of the config, so that two inits agree."""
        generator = torch.Generator("cpu").manual_seed(self.config.seed * 100_003 + self.layer_idx)
        return draw_projection(self.config.num_random_features, self.config.head_dim, generator)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        queries: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, queries)
        kernel = (self.projection_matrix, attention_mask, self.config.kernel_epsilon)
        if output_attentions:
            # what is shown is what is used, and has its gradient
            weights = favor_attention_weights(query, key, *kernel)
            context = (weights @ value.to(weights.dtype)).to(value.dtype)
        else:
            weights, context = None, favor_attention(query, key, value, *kernel)
        return self.dropout(self.o_proj(context.transpose(1, 2).flatten(-2))), weights
