"""Scores of masked expression modelling, beside a baseline that knows each gene's habits and no cell."""

import numpy as np
import torch

from ..evaluation.per_gene_mode import PerGeneModeBaseline
from ..modeling_scbert.cell_scbert import whole_cell_loss


class MaskedScores:
    """
    Gathers cross-entropy over the tokens asked for, and accuracy over those of them that were hidden.

    A token asked for but left in sight (one in ten) counts in the loss, as in training; accuracy would be flattered by
    it. The baseline predicts from the gene alone, on the same tokens; whole cells, where they are predicted, are
    compared with the mean cell, as log expression of every gene [genes].
    """

    # rows of `totals`: tokens, loss, baseline's loss; tokens and loss of modality prediction; cells, loss and the mean
    # cell's loss of whole-cell prediction;
    # of `by_bin`: hidden tokens, hits, the gene's mode's hits, the cell's mode's hits
    def __init__(self, baseline: PerGeneModeBaseline, vocab_size: int, mean_cell: np.ndarray | None = None):
        self.mean_cell = mean_cell
        self.mode = torch.from_numpy(baseline.mode)
        self.log_shares = torch.from_numpy(baseline.log_shares)
        self.totals = torch.zeros(8, dtype=torch.float64)
        self.by_bin = torch.zeros(4, vocab_size, dtype=torch.float64)

    def add(
        self,
        logits: torch.Tensor,
        batch: dict[str, torch.Tensor],
        mask_token_id: int,
        modality_loss: torch.Tensor | None = None,
        cell_loss: torch.Tensor | None = None,
    ) -> None:
        """
        Add a batch: its logits [labelled tokens, vocab_size], in reading order of the labels.

        Without ``gene_ids`` its genes are in the panel's order. The losses are means, over its tokens where modalities
        are predicted as well, and over its cells where these are, from ``cell_targets`` [batch, genes].
        """
        batch = {name: value.cpu() for name, value in batch.items()}
        logits = logits.detach().float().cpu()
        asked = batch["labels"] != -100
        genes = batch.get("gene_ids")
        if genes is None:
            genes = torch.arange(asked.shape[1]).expand(asked.shape)
        genes, truth = genes[asked], batch["labels"][asked]
        hidden = batch["input_ids"][asked] == mask_token_id
        loss = torch.nn.functional.cross_entropy(logits, truth, reduction="sum")
        known = -self.log_shares[genes, truth].sum().item()
        modality = [0, 0.0]
        if modality_loss is not None:
            tokens = int(batch.get("attention_mask", torch.ones_like(batch["labels"])).sum())
            modality = [tokens, tokens * modality_loss.item()]
        whole = [0, 0.0, 0.0]
        if cell_loss is not None:
            targets = batch["cell_targets"]
            known_cell = whole_cell_loss(torch.from_numpy(self.mean_cell).expand(targets.shape), targets)
            n_cells = int((targets > 0).any(dim=1).sum())
            whole = [n_cells, n_cells * cell_loss.item(), n_cells * known_cell.item()]
        self.totals += torch.tensor([len(truth), loss.item(), known, *modality, *whole], dtype=torch.float64)
        of_cell = commonest_in_sight(batch["input_ids"], mask_token_id)[asked.nonzero()[:, 0]]
        right = (logits.argmax(-1) == truth, self.mode[genes] == truth, of_cell == truth)
        for row, weight in enumerate((torch.ones_like(truth), *right)):
            self.by_bin[row] += torch.bincount(
                truth[hidden], weights=weight[hidden].double(), minlength=self.by_bin.shape[1]
            )

    def metrics(self) -> dict[str, float]:
        """
        Loss and accuracy beside the baselines'.

        ``baseline_masked_accuracy`` is that of the gene's commonest bin, ``cell_baseline_masked_accuracy`` of the
        cell's; of each there is the mean over bins (``..._bin_mean``), and ``masked_accuracy_bin_3`` and the like for
        bins that were asked for. ``baseline_cell_loss`` is of the mean cell.
        """
        tokens, loss, baseline_loss, modality_tokens, modality_loss, *whole = self.totals.tolist()
        found = {
            "loss": loss / max(1.0, tokens),
            "baseline_loss": baseline_loss / max(1.0, tokens),
            "masked_tokens": int(self.by_bin[0].sum()),
        }
        if modality_tokens:
            found["modality_loss"] = modality_loss / modality_tokens
        if whole[0]:
            found |= {"cell_loss": whole[1] / whole[0], "baseline_cell_loss": whole[2] / whole[0]}
        asked = self.by_bin[0] > 0
        names = ("masked_accuracy", "baseline_masked_accuracy", "cell_baseline_masked_accuracy")
        for name, hits in zip(names, self.by_bin[1:]):
            by_bin = hits[asked] / self.by_bin[0][asked]
            found[name] = (hits.sum() / self.by_bin[0].sum().clamp(min=1)).item()
            found[f"{name}_bin_mean"] = by_bin.mean().item() if len(by_bin) else 0.0
            for label, value in zip(asked.nonzero().flatten().tolist(), by_bin.tolist()):
                found[f"{name}_bin_{label}"] = value
        return found


def commonest_in_sight(input_ids: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """
    The bin that most of a cell's expressed genes in sight have; 1 where none is.

    A second baseline: in shallow cells most genes have one count, which the size factor sends to one bin of the
    cell, so that knowing the cell's depth alone predicts much. Of ids [batch, length] after masking, int64 [batch].

    Examples
    --------
    >>> commonest_in_sight(torch.tensor([[2, 2, 3, 0, 0, 0, 6], [0, 0, 0, 0, 0, 0, 0]]), 6).tolist()
    [2, 1]
    """
    counts = torch.stack([(input_ids == level).sum(dim=1) for level in range(1, mask_token_id)], dim=1)
    return counts.argmax(dim=1) + 1
