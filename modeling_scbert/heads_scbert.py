"""What stands on the encoder and is more than one linear map."""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_scbert import ScBertConfig
from .packing_scbert import unpacked


def share_of_batches(loss: torch.Tensor, labels: torch.Tensor | None, kwargs: dict) -> torch.Tensor:
    """A mean over a batch as a share of that over all accumulated batches, as the loss of masked expression is."""
    if labels is None or kwargs.get("num_items_in_batch") is None:
        return loss
    return loss * (labels != -100).sum() / kwargs["num_items_in_batch"]


def probabilities_of(logits: torch.Tensor, config: ScBertConfig) -> torch.Tensor:
    """Probabilities ``[batch, labels]`` of logits: of one type a cell, or each by itself where it may have several."""
    several = config.problem_type == "multi_label_classification"
    return logits.float().sigmoid() if several else logits.float().softmax(dim=-1)


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
        self.novelty = ScBertNovelty(pooled_size, config) if config.cell_vector_size else None

    def pool(self, hidden_states, attention_mask=None, gene_ids=None) -> torch.Tensor:
        """
        ``[batch, length, hidden]`` to ``[batch, max_position_embeddings]`` (conv) or ``[batch, hidden]`` (mean); with
        ``pooling="cell"`` the encoder has done it.
        """
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

    def forward(
        self, hidden_states, attention_mask=None, gene_ids=None, cells=None
    ) -> dict[str, torch.Tensor | None]:
        """
        From last hidden states, or the encoder's vectors of ``cells [batch, hidden]`` where it makes them.

        Logits ``[batch, labels]``, and where nothing is trained, ``probabilities [batch, labels]`` of all types, which
        sum to less than 1 where the cell looks like none of them, and ``cell_vectors [batch, size]``.
        """
        pooled = cells if cells is not None else self.pool(*unpacked(hidden_states, attention_mask, gene_ids))
        states = pooled
        for dense in self.dense:
            states = self.dropout(nn.functional.relu(dense(states)))
        logits, probabilities, vectors = self.out_proj(states), None, None
        if not self.training:
            probabilities = probabilities_of(logits, self.config)
            if self.novelty is not None:
                vectors = self.novelty.vectors(pooled)
                probabilities = probabilities * self.novelty(vectors).unsqueeze(-1)
        return {"logits": logits, "probabilities": probabilities, "cell_vectors": vectors}


class ScBertNovelty(nn.Module):
    """
    How likely a cell is of one of the known types, by what is fitted once the head is (training/novelty_head.py).

    By how far its vector lies from the center of the nearest type (Mahalanobis distance; Lee et al. 2018), less a share
    of how far it lies from the mean of all cells: cells of another study are farther from both, and hardly more novel
    for that (Ren et al. 2021). How common new types are in a query nobody knows, and in most there is none: a distance
    says no more than that the cell is not sure enough to have a name. No gradient trains these: buffers.
    """

    # a distance that no cell has: what makes a cell novel in a model that was fitted to nothing
    NEVER = 1e30
    # what the squared distance to the mean of all cells counts beside that to the nearest type
    SHARE_OF_ALL = 0.75
    # share of the vectors' squared weights that measured genes must have for a distance to say something
    LEAST_MEASURED = 0.8
    # what a cell keeps of its probabilities however far it lies: less than the threshold by this, and this at most
    BELOW_THRESHOLD, MOST_KEPT = 0.01, 0.8

    def __init__(self, pooled_size: int, config: ScBertConfig):
        super().__init__()
        self.config, size = config, config.cell_vector_size
        self.register_buffer("projection", torch.empty(size, pooled_size))
        self.register_buffer("offset", torch.empty(size))
        # of the types, and of all cells
        self.register_buffer("centers", torch.empty(config.num_labels + 1, size))
        # the relative distance at which a cell is as likely novel as known, and how the log odds rise with it
        self.register_buffer("odds", torch.empty(2))

    def start_weights(self) -> None:
        """Nothing is novel; nor is it where types were loaded that are not those of the checkpoint."""
        if not getattr(self.centers, "_is_hf_initialized", False):
            # what was fitted to other types is not kept
            self.odds._is_hf_initialized = False
        for name in ("projection", "offset", "centers"):
            init.zeros_(getattr(self, name))
        init.copy_(self.odds, torch.tensor([self.NEVER, 1.0]))

    def tells_without(self, absent) -> bool:
        """Whether distances say something of cells that lack the ``absent`` genes: places in the panel, ``[genes]``."""
        if len(absent) == 0 or self.config.pooling != "conv":
            return True
        weights = self.projection.float().square().sum(dim=0)
        lacking = weights[torch.as_tensor(absent, device=weights.device)].sum()
        return bool(lacking <= (1 - self.LEAST_MEASURED) * weights.sum())

    @classmethod
    def least_share(cls, threshold: float | None) -> float:
        """What a cell keeps of its probabilities however far it lies: by this threshold it is left unassigned."""
        return 0.0 if threshold is None else max(0.0, min(threshold - cls.BELOW_THRESHOLD, cls.MOST_KEPT))

    def vectors(self, pooled) -> torch.Tensor:
        """Cell vectors ``[batch, size]`` of what the pooling gives; their unit is the scatter within a type."""
        # in full precision: a distance is a small difference of large numbers
        with torch.autocast(pooled.device.type, enabled=False):
            return nn.functional.linear(pooled.float(), self.projection.float(), self.offset.float())

    def forward(self, vectors) -> torch.Tensor:
        """Share of its probabilities that a cell keeps, ``[batch]``."""
        squared = (vectors.unsqueeze(1) - self.centers.float()).square().sum(dim=-1)
        distances = squared[:, :-1].amin(dim=1) - self.SHARE_OF_ALL * squared[:, -1]
        even, slope = self.odds.float()
        known = (slope * (even - distances)).sigmoid()
        return known.clamp(min=self.least_share(self.config.unassigned_threshold))
