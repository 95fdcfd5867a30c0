"""The cell token: one vector for a cell, which starts as linear axes of expression; and the whole cell told from it."""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_scbert import ScBertConfig
from .embeddings_scbert import expression_plane
from .packing_scbert import is_packed, unpack, unpacked


class ScBertCell(nn.Module):
    r"""
    Last hidden states to a vector of the cell, with ``pooling="cell"``.

    .. math:: c = scale \sum_t r_t E_{gene(t)} - offset + W h_{cell}

    ``E`` is the gene table, ``h_cell`` the state of the trailing token, and ``r_t`` the bin that a token's state tells.
    With ``ordinal_expression`` all bins lie on one quarter of a circle, of which a bin is the sine, and genes lie
    across it: whatever a gene's vector is long, the norm leaves the ratio of the two coordinates in that plane, and
    without layers ``r_t`` is the bin itself. Where the gene table holds the loadings of linear axes, ``c`` then starts
    as the cell along these axes. Layers, whose branches start at nothing, and ``W``, which starts at zero, correct it.

    Masked tokens are left out of the sum, which is scaled up by as many expressed genes as that takes away.

    The read is exact without sinusoidal positions and with one modality; with others it learns what to subtract.
    """

    def __init__(self, config: ScBertConfig):
        super().__init__()
        self.config = config
        self.reader = nn.Linear(config.hidden_size, 2, bias=False)
        self.correction = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("offset", torch.empty(config.hidden_size))
        self.register_buffer("scale", torch.empty(()))

    def start_weights(self) -> None:
        """The plane of ordinal expression, no correction, and the sum as it is."""
        init.copy_(self.reader.weight, expression_plane(self.config))
        init.zeros_(self.correction.weight)
        init.zeros_(self.offset)
        init.ones_(self.scale)

    def forward(self, hidden_states, gene_table, input_ids=None, attention_mask=None, gene_ids=None):
        """
        Vectors ``[batch, hidden]`` of last hidden states ``[batch, length, hidden]``, or of packed cells.

        The gene table is ``[genes + 1, hidden]``, the trailing token last. ``input_ids [batch, length]`` tell masked
        and expressed tokens; without, none is masked. The rest is as in `ScBertModel`.
        """
        if is_packed(attention_mask):
            input_ids = None if input_ids is None else unpack(input_ids, attention_mask)
            hidden_states, attention_mask, gene_ids = unpacked(hidden_states, attention_mask, gene_ids)
        dtype = hidden_states.dtype
        # in full precision: a cell is a small difference of large sums
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states, table, *own = (
                x.to(torch.promote_types(x.dtype, torch.float32))
                for x in (hidden_states, gene_table, self.reader.weight, self.correction.weight)
            )
            return self._vectors(hidden_states, table, *own, input_ids, attention_mask, gene_ids).to(dtype)

    def _vectors(self, hidden_states, table, reader, correction, input_ids, attention_mask, gene_ids):
        shape, last = hidden_states.shape[:2], table.shape[0] - 1
        if gene_ids is None:
            gene_ids = torch.arange(shape[1], device=hidden_states.device)
        gene_ids = gene_ids.expand(shape)
        present = torch.ones_like(gene_ids, dtype=torch.bool)
        if attention_mask is not None:
            present = attention_mask.bool().expand(shape)
        trailing = present & (gene_ids == last)
        weights = (present & ~trailing).to(hidden_states.dtype)
        if input_ids is not None and self.config.mask_token_id is not None:
            expressed = weights * (input_ids > 0)
            weights = weights * (input_ids != self.config.mask_token_id)
            seen = (expressed * weights).sum(dim=1, keepdim=True)
            weights = weights * expressed.sum(dim=1, keepdim=True) / seen.clamp(min=1)
        bins = read_bins(hidden_states @ reader.T, self.config.vocab_size - 2) * weights
        # every gene in its own place: [batch, genes + 1], and one product with the table
        cells = bins.new_zeros(shape[0], last + 1).scatter_add(1, gene_ids, bins)
        token = torch.einsum("bl,blh->bh", trailing.to(hidden_states.dtype), hidden_states)
        return self.scale * (cells @ table) - self.offset + token @ correction.T


def read_bins(plane: torch.Tensor, highest: int) -> torch.Tensor:
    """
    Bins ``[...]`` by their place on the arc of ordinal expression, at the end of which is the ``highest``.

    Coordinates ``[..., 2]`` are those in the plane of the arc, at any distance from its center.

    Examples
    --------
    >>> read_bins(torch.tensor([[0.0, 2.0], [3.0, 3.0 * 3**0.5], [5.0, 0.0]]), 6)
    tensor([0., 3., 6.])
    """
    # the least number keeps the gradient of a state without any part in the plane finite
    return highest * plane[..., 0] * (plane.square().sum(dim=-1) + 1e-12).rsqrt()


class ScBertCellDecoder(nn.Module):
    """
    Expression of all genes from a cell vector, through the gene table: ``b_g + (M c) . (scale E_g)``, as logits.

    There is no second table: a gene's vector says what it tells of a cell and what a cell tells of it, as in the
    inner-product decoder of scGPT's objective for the cell embedding (GEPC; Cui et al. 2024, equation 14). ``M``
    starts at zero: every cell is then the mean cell, which ``b`` is (`training.initial_model`).
    """

    def __init__(self, config: ScBertConfig):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.bias = nn.Parameter(torch.empty(config.max_position_embeddings - 1))

    def start_weights(self) -> None:
        """Zeros: all genes alike in all cells."""
        init.zeros_(self.project.weight)
        init.zeros_(self.bias)

    def forward(self, cells: torch.Tensor, encoder: nn.Module) -> torch.Tensor:
        """Logits ``[batch, genes]`` of cell vectors ``[batch, hidden]``, through the gene table of the encoder."""
        genes = encoder.embeddings.gene_embeddings.weight[:-1]
        return self.bias + (encoder.cell.scale * self.project(cells)).to(genes.dtype) @ genes.T


def whole_cell_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of a cell's expression with predicted shares, in nats; the mean over cells.

    The likelihood of a multinomial, for each unit of expression: how many counts a cell has in all, the library size
    that scVI (Lopez et al. 2018) puts into its likelihood, has no part in it. The entropy of the cell's own shares is
    not taken off: it is what a perfect prediction would score. 0 if no cell has any expression.

    Targets are expression, ``[batch, genes]`` as the logits, in units that add up (counts, or counts per 10,000; no
    logarithms), and negative where a gene was not measured. Such genes take no part, nor do cells without expression.

    Examples
    --------
    >>> whole_cell_loss(torch.zeros(1, 3), torch.tensor([[2.0, 6.0, -100.0]]))
    tensor(0.6931)
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    measured = targets >= 0
    shares = targets.clamp(min=0).to(logits.dtype)
    totals = shares.sum(dim=1, keepdim=True)
    log_shares = logits.masked_fill(~measured, -torch.inf).log_softmax(dim=1).masked_fill(~measured, 0.0)
    # a cell of which nothing was measured has no softmax
    log_shares = log_shares.masked_fill(totals == 0, 0.0)
    losses = -(shares / totals.clamp(min=1e-12) * log_shares).sum(dim=1)
    return losses.sum() / (totals > 0).sum().clamp(min=1)
