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
        """Random rows, zeros for the trailing token; across the arc of ordinal expression, and of one length."""
        init.normal_(self.weight, std=self.config.initializer_range)
        if self.config.ordinal_expression:
            init.copy_(self.weight, across_arc(self.weight, self.config))
        # a slice of the table loses its "already loaded" mark, so ask the table
        if not getattr(self.weight, "_is_hf_initialized", False):
            init.zeros_(self.weight[-1])

    def forward(self, gene_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(gene_ids, self.weight)


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """
    Fixed positions (Vaswani et al. 2017, section 3.5), sines at even, cosines at odd features: float32
    ``[*position_ids.shape, hidden_size]``, of an even size.
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
        """
        With ``ordinal_expression``, bins in their order on a quarter of a circle; else as every embedding starts.

        All bins are of one length, so that a layer norm divides every token by the same number: what is left along
        the first axis of the plane is proportional to the bin. The mask's row is a random one.
        """
        config = self.config
        if not config.ordinal_expression:
            return
        plane = expression_plane(config)
        share = torch.arange(config.vocab_size - 1).to(plane) / max(1, config.vocab_size - 2)
        on_arc = torch.stack([share, (1 - share**2).sqrt()], dim=1) @ plane
        mask = _normal(config.seed + 1, 1, config.hidden_size) * config.initializer_range
        init.copy_(self.weight, torch.cat([on_arc * arc_radius(config), mask]))


def expression_plane(config) -> torch.Tensor:
    """
    Two axes at right angles, ``[2, hidden]``; the first is the way that expression grows.

    Their means are zero, or layer norms would take a part of them away.
    """
    axes = _normal(config.seed, config.hidden_size, 2)
    return torch.linalg.qr(axes - axes.mean(dim=0))[0].T.contiguous()


def _normal(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers by the seed alone, whatever dtype and device new tensors have by default."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def across_arc(rows: torch.Tensor, config) -> torch.Tensor:
    """Gene rows ``[genes, hidden]`` across the arc of ordinal expression, with zero means and of one length."""
    arc = expression_plane(config).to(rows)
    rows = rows - rows.mean(dim=1, keepdim=True)
    return arc_radius(config) * nn.functional.normalize(rows - rows @ arc.T @ arc)


def arc_radius(config) -> float:
    """Length of an embedding that starts with ordinal expression: that of a random one, in the mean."""
    return config.initializer_range * config.hidden_size**0.5


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
        Embed a batch of cells, ``[batch, length, hidden]``; arguments as in `ScBertModel`.

        Genes may be ``[length]``. To ``inputs_embeds``, which are for attribution, genes, modalities and positions are
        added all the same.
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
