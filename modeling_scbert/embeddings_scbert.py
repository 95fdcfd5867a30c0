"""What a token is: its expression bin, its gene, and where there are several, its modality; summed."""

import math

import torch
from torch import nn
from transformers import initialization as init


class ScBertGeneEmbeddings(nn.Module):
    """
    The gene table [genes + 1, hidden]; the last row belongs to the trailing token and starts at zero.

    Frozen, it is a persistent buffer rather than a parameter: ``from_pretrained`` sets ``requires_grad`` on every
    parameter, and distributed training refuses parameters that never get a gradient.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        weight = torch.empty(config.max_position_embeddings, config.hidden_size)
        if config.freeze_gene_embeddings:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)

    def start_weights(self) -> None:
        """Random rows, zeros for the trailing token; nothing along the line of ordinal expression."""
        init.normal_(self.weight, std=self.config.initializer_range)
        if self.config.ordinal_expression:
            direction = expression_direction(self.config).to(self.weight)
            init.copy_(self.weight, self.weight - (self.weight @ direction).unsqueeze(-1) * direction)
        # a slice of the table loses its "already loaded" mark, so ask the table
        if not getattr(self.weight, "_is_hf_initialized", False):
            init.zeros_(self.weight[-1])

    def forward(self, gene_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(gene_ids, self.weight)


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """
    Fixed sine/cosine positions (Vaswani et al. 2017, section 3.5).

    Parameters
    ----------
    position_ids
        Integers, any shape.
    hidden_size
        Even width of the encoding.

    Returns
    -------
    Float32 tensor ``[*position_ids.shape, hidden_size]``: sines at even, cosines at odd features.
    """
    pairs = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids.float().unsqueeze(-1) * torch.exp(pairs * (-math.log(10000.0) / hidden_size))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class ScBertExpressionEmbeddings(nn.Embedding):
    """The table of expression bins and the mask, [vocab_size, hidden]."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.hidden_size)
        self.config = config

    def start_weights(self) -> None:
        """With ``ordinal_expression``, bins in their order on a line; else as every embedding starts."""
        if self.config.ordinal_expression:
            init.copy_(self.weight, self.ordered())

    def ordered(self) -> torch.Tensor:
        """
        Rows ``[vocab_size, hidden]`` on a line from zero; a random one for the mask.

        The last bin is half as long as a gene's row: at the end of the norm, a token's share along the line is then
        nearly proportional to its bin.
        """
        config = self.config
        bins = torch.arange(config.vocab_size - 1) / max(1, config.vocab_size - 2)
        length = config.initializer_range * config.hidden_size**0.5 / 2
        generator = torch.Generator().manual_seed(config.seed + 1)
        mask = torch.randn(1, config.hidden_size, generator=generator) * config.initializer_range
        return torch.cat([bins[:, None] * expression_direction(config) * length, mask])


def expression_direction(config) -> torch.Tensor:
    """Where ordinal expression points, ``[hidden]``; of mean zero, or layer norms would take a part of it away."""
    direction = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(config.seed))
    direction -= direction.mean()
    return direction / direction.norm()


class ScBertEmbeddings(nn.Module):
    """Sum of expression, gene, modality and position embeddings, then dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.expression_embeddings = ScBertExpressionEmbeddings(config)
        self.gene_embeddings = ScBertGeneEmbeddings(config)
        if config.num_modalities > 1:
            self.modality_embeddings = nn.Embedding(config.num_modalities, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embed a batch of cells.

        Parameters
        ----------
        input_ids
            Expression bins ``[batch, length]``.
        gene_ids
            Rows of the gene table ``[batch, length]`` (or ``[length]``); the panel's order by default.
        modality_ids
            Modalities ``[batch, length]``; all zero by default.
        inputs_embeds
            Expression embeddings ``[batch, length, hidden]`` in place of ``input_ids`` (for attribution); genes,
            modalities and positions are added all the same.

        Returns
        -------
        Tensor ``[batch, length, hidden]``.
        """
        expression = self.expression_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = expression.shape[1]
        if gene_ids is None:
            if length > self.config.max_position_embeddings:
                raise ValueError(
                    f"The input has {length} tokens, the gene table {self.config.max_position_embeddings} rows. "
                    "Align cells to the model's own panel (its tokenizer does), or pass gene_ids."
                )
            gene_ids = torch.arange(length, device=expression.device)
        embeddings = expression + self.gene_embeddings(gene_ids)
        if self.config.num_modalities > 1:
            if modality_ids is None:
                modality_ids = torch.zeros_like(gene_ids)
            embeddings = embeddings + self.modality_embeddings(modality_ids)
        if self.config.position_embedding_type == "sinusoidal":
            positions = sinusoidal_positions(gene_ids, self.config.hidden_size)
            embeddings = embeddings + positions.to(embeddings.dtype)
        return self.dropout(embeddings)
