"""scMBERT end to end, small: two files to one, pretraining with both losses, fine-tuning on a frozen first layer."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scbert import ScBertForCellClassification, ScBertForMaskedExpression, ScBertTokenizer
from scbert.data.multiomics import combine_files
from scbert.tokenization import InputError
from scbert.training.initial_model import new_config
from scbert.training.run_finetune import finetune
from scbert.training.run_pretrain import pretrain

pytest.importorskip("bioframe")

MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_random_features": 8,
    "freeze_gene_embeddings": False,
}
TOKENIZER = {"binning": "quantile", "n_bins": 7, "keep_zeros": False, "max_length": 40}
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01}


@pytest.fixture
def both(adata, tmp_path):
    """Genes of the synthetic cells and 20 peaks that know the cell type, in one file."""
    rna = adata[:40].copy()
    peaks = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(1, 21)]
    types = rna.obs["cell_type"].cat.codes.to_numpy()
    open_in = (np.arange(20) % 3 == types[:, None]).astype(np.float32)
    atac = anndata.AnnData(sp.csr_matrix(open_in), obs=rna.obs[[]], var=pd.DataFrame(index=peaks))
    rna.write_h5ad(tmp_path / "rna.h5ad"), atac.write_h5ad(tmp_path / "atac.h5ad")
    files = tmp_path / "rna.h5ad", tmp_path / "both.h5ad"
    summary = combine_files(files[0], files[1], atac=tmp_path / "atac.h5ad", genome="GRCh38")
    assert summary["features"] == {"Gene Expression": adata.n_vars, "Peaks": 20}
    return files[1]


def write_recipe(path, **sections):
    path.write_text(json.dumps({"model": MODEL, "tokenizer": TOKENIZER, **sections}))
    return path


def test_pretrain_and_fine_tune(both, tmp_path):
    recipe = write_recipe(tmp_path / "pretrain.json", training=TRAINING)
    summary = pretrain(corpus=both, output=tmp_path / "base", recipe=recipe, seed=1)
    assert summary["modality_loss"] > 0 and summary["loss"] > 0
    base = ScBertForMaskedExpression.from_pretrained(tmp_path / "base")
    assert base.config.num_modalities == 2
    tokenizer = ScBertTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.init_kwargs["genome_build"] == "hg38"
    assert tokenizer.feature_modalities.sum() == 20

    given = {"reference": both, "label_key": "cell_type", "base": tmp_path / "base", "seed": 1}
    model = MODEL | {"pooling": "mean", "classifier_hidden_sizes": []}
    training = TRAINING | {"train_all": True, "frozen_layers": 1}
    recipe = write_recipe(tmp_path / "finetune.json", model=model, training=training)
    finetune(output=tmp_path / "model", recipe=recipe, **given)
    tuned = ScBertForCellClassification.from_pretrained(tmp_path / "model").scbert.state_dict()
    for name, weight in base.scbert.state_dict().items():
        # features are redrawn and the first layer stays; the rest has been trained
        if "projection_matrix" not in name:
            assert torch.equal(tuned[name], weight) == name.startswith("layers.0."), name

    recipe = write_recipe(tmp_path / "deep.json", model=model, training=training | {"frozen_layers": 3})
    with pytest.raises(InputError, match="has 2 layers"):
        finetune(output=tmp_path / "other", recipe=recipe, **given)


def test_fine_tuning_from_random_weights_takes_both_modalities(both, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", training=TRAINING | {"num_train_epochs": 1})
    finetune(reference=both, label_key="cell_type", output=tmp_path / "model", recipe=recipe, seed=1)
    tokenizer = ScBertTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.feature_modalities.sum() == 20 and tokenizer.init_kwargs["genome_build"] == "hg38"
    assert new_config({}, tokenizer, 0).num_modalities == 2
    # the modalities' decoder, too, is new where a classifier is pretrained further
    scores = pretrain(
        corpus=both, output=tmp_path / "further", base=tmp_path / "model", epochs=1, batch_size=8
    )
    assert scores["modality_loss"] > 0
