"""What stands on the encoder and is more than one linear map."""

import torch
from torch import nn

from .configuration_scbert import ScBertConfig
from .packing_scbert import unpacked


class ScBertClassificationHead(nn.Module):
    """Tokens to class logits: pool to one vector per cell, then a small perceptron."""

    def __init__(self, config: ScBertConfig):
        super().__init__()
        self.config = config
        if config.pooling == "conv":
            # a convolution with one output channel over the feature axis is a linear map of each token to a number
            self.conv = nn.Linear(config.hidden_size, 1)
        pooled_size = config.max_position_embeddings if config.pooling == "conv" else config.hidden_size
        sizes = [pooled_size, *config.classifier_hidden_sizes]
        self.dense = nn.ModuleList([nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)])
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(sizes[-1], config.num_labels)

    def pool(self, hidden_states, attention_mask=None, gene_ids=None) -> torch.Tensor:
        """``[batch, length, hidden]`` to ``[batch, max_position_embeddings]`` (conv) or ``[batch, hidden]`` (mean)."""
        if self.config.pooling == "mean":
            if attention_mask is None:
                return hidden_states.mean(dim=1)
            weights = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
            return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1)
        values = nn.functional.relu(self.conv(hidden_states).squeeze(-1))
        if attention_mask is not None:
            values = values * attention_mask.to(values.dtype)
        panel_size = self.config.max_position_embeddings
        if gene_ids is not None:
            # each gene has its own input of the perceptron, wherever it stands in the sequence
            gene_ids = gene_ids.expand(values.shape)
            return values.new_zeros(values.shape[0], panel_size).scatter_add(1, gene_ids, values)
        if values.shape[1] != panel_size:
            raise ValueError(
                f'The head with pooling="conv" was built for {panel_size} tokens and got {values.shape[1]}. '
                "Align cells to the model's own panel (its tokenizer does), or pass gene_ids."
            )
        return values

    def forward(self, hidden_states, attention_mask=None, gene_ids=None) -> torch.Tensor:
        pooled = self.pool(*unpacked(hidden_states, attention_mask, gene_ids))
        for dense in self.dense:
            pooled = self.dropout(nn.functional.relu(dense(pooled)))
        return self.out_proj(pooled)
