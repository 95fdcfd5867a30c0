"""Pretraining on packed batches: the losses and scores of padded ones."""

import numpy as np
import torch

from scbert import ScBertTokenizer
from scbert.training.cell_batches import CellDataset, DataCollatorForMaskedExpression
from scbert.training.run_pretrain import pretrain

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
SIZE |= {"num_random_features": 16, "intermediate_size": 32}


def test_losses_and_scores_are_those_of_padded_batches(adata, tmp_path):
    torch.set_num_threads(1)
    adata[:40].write_h5ad(tmp_path / "cells.h5ad")
    given = {"model": SIZE, "tokenizer": {"keep_zeros": False}, "batch_size": 4, "epochs": 2, "use_cpu": True}
    given |= {"gradient_accumulation_steps": 2, "disable_tqdm": True, "logging_steps": 1, "seed": 3}
    found = {}
    for packing in (False, True):
        summary = pretrain(tmp_path / "cells.h5ad", tmp_path / str(packing), packing=packing, **given)
        history = summary["training"]["history"]
        losses = [row["loss"] for row in history if "loss" in row]
        found[packing] = [*losses, summary["loss"], summary["masked_accuracy"]]
    assert len(found[True]) > 5
    np.testing.assert_allclose(found[True], found[False], rtol=1e-4)


def test_the_collator_packs_what_it_would_pad(adata):
    tokenizer = ScBertTokenizer(gene_panel=adata.var_names.tolist(), keep_zeros=False)
    cells = CellDataset(tokenizer.bin_cells(adata[:3]))
    items = cells.__getitems__(range(3))
    padded, packed = (DataCollatorForMaskedExpression(tokenizer, packing=on)(items) for on in (False, True))
    keep = padded["attention_mask"].bool()
    assert packed["attention_mask"].diff().tolist() == keep.sum(dim=1).tolist()
    for name in ("input_ids", "labels", "gene_ids"):
        assert torch.equal(packed[name][0], padded[name][keep]), name
    assert packed["indices"].tolist() == [0, 1, 2]
    every_gene = ScBertTokenizer(gene_panel=adata.var_names.tolist())
    batch = DataCollatorForMaskedExpression(every_gene, packing=True)(items)
    assert batch["input_ids"].shape == (3, 301)
