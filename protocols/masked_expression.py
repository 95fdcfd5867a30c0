"""Masked expression on a benchmark's test cells: a pretrained base beside each gene's commonest bin."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch

from ..evaluation.per_gene_mode import PerGeneModeBaseline, count_bins
from ..trained_model.model_folder import load_tokenizer
from ..training.cell_batches import CellDataset, DataCollatorForMaskedExpression
from ..training.initial_model import load_masked_model
from .cells import input_of
from .folds import TEST, TRAIN, Fold

MAX_CELLS = 500
BATCH = 16


@torch.inference_mode()
def masked_accuracy(base: str | Path, cells: anndata.AnnData, fold: Fold, seed: int) -> dict[str, Any]:
    """
    Share of masked genes of the fold's test cells whose bin the base names, and what the gene alone achieves.

    These are ``base`` and ``commonest_bin``, over the same ``tokens``, of at most 500 cells; the commonest bins are
    counted in the fold's training cells.
    """
    model, tokenizer = load_masked_model(base).eval(), load_tokenizer(base)
    bins = tokenizer.bin_cells(cells, input=input_of(cells))
    learnt = bins[np.flatnonzero(fold.split == TRAIN)]
    mode = PerGeneModeBaseline(count_bins(learnt, tokenizer.vocab_size)).mode
    rows = np.flatnonzero(fold.split == TEST)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_CELLS])
    dataset = CellDataset(bins, rows=rows)
    collate = DataCollatorForMaskedExpression(tokenizer, seed=seed)
    right = guessed = tokens = 0
    for start in range(0, len(rows), BATCH):
        batch = collate(dataset.__getitems__(range(start, min(start + BATCH, len(rows)))))
        labels, _ = batch.pop("labels"), batch.pop("indices")
        masked = labels != -100
        genes = batch.get("gene_ids")
        genes = torch.arange(labels.shape[1]).expand(labels.shape) if genes is None else genes
        # labels would let a sparse head leave tokens out
        predicted = model(**batch).logits.argmax(dim=-1)
        right += int((predicted[masked] == labels[masked]).sum())
        guessed += int((mode[genes[masked].numpy()] == labels[masked].numpy()).sum())
        tokens += int(masked.sum())
    return {"base": right / max(tokens, 1), "commonest_bin": guessed / max(tokens, 1), "tokens": tokens}
