"""An encoder that stays as it is, and gene vectors brought to scale."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from scbert.training.gene2vec import GeneVectors, save_gene_vectors
from scbert.training.run_finetune import finetune
from scbert.training.run_pretrain import pretrain

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 0,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
}


def test_a_frozen_encoder_stays(reference, tiny_recipe, tmp_path, caplog):
    # there is nothing to keep yet
    finetune(reference, "cell_type", tmp_path / "base", recipe=tiny_recipe, seed=1, freeze_encoder=True)
    assert "without a base (base, --base) every weight is trained: freeze_encoder" in caplog.text
    options = {"recipe": tiny_recipe, "base": tmp_path / "base", "freeze_encoder": True, "seed": 2}
    finetune(reference, "cell_type", tmp_path / "tuned", **options, frozen_layers=0)
    assert "(train_all: none): frozen_layers" in caplog.text
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
        for name in ("base", "tuned")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("classifier.", "scbert.final_norm.")) for name in changed)


def test_gene_vectors_are_brought_to_scale(reference, adata, tmp_path):
    genes = list(adata.var_names)
    matrix = np.random.default_rng(0).normal(0, 3, (len(genes), 16)).astype(np.float32)
    save_gene_vectors(GeneVectors(genes, matrix), tmp_path / "vectors.txt")
    pretrain(
        reference, tmp_path / "model", gene_vectors=tmp_path / "vectors.txt", gene_vectors_std=0.02, max_steps=1,
        min_genes=0, model={**SMALL, "num_hidden_layers": 1, "num_random_features": 8, "freeze_gene_embeddings": True},
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    table = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").scbert.embeddings.gene_embeddings.weight[
        :-1
    ]
    assert table.std().item() == pytest.approx(0.02, rel=0.05)
