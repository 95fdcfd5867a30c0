"""The protocol that compares modalities, and values that only the caller can name."""

import json

import numpy as np
import pytest
import torch

from scbert.protocols import run_benchmark
from scbert.protocols.cells import load_benchmark_cells
from scbert.tokenization import InputError

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "intermediate_size": 8,
    "num_random_features": 8,
    "classifier_hidden_sizes": [],
}
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 32, "learning_rate": 0.03, "use_cpu": True}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def cells_file(adata, tmp_path):
    """Cells whose last 20 features pass for peaks."""
    names = adata.var_names.tolist()
    names[280:] = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(1, 21)]
    adata.var_names = names
    adata.var["feature_types"] = ["Gene Expression"] * 280 + ["Peaks"] * 20
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model": TINY, "tokenizer": {"keep_zeros": False}, "training": TRAINING}))
    return path


def test_modalities_run_alone_and_together(cells_file, recipe, tmp_path):
    options = {"recipe": str(recipe), "baselines": "logistic_l2", "folds": 2}
    result = run_benchmark("modalities", cells_file, "cell_type", tmp_path / "out", **options)
    scores = {(entry["model"], entry["setting"]): entry["macro_f1"] for entry in result["summary"]}
    assert {setting for _, setting in scores} == {"RNA+ATAC", "RNA alone", "ATAC alone"}
    # the markers are among the genes, nothing among the peaks
    assert scores["logistic_l2", "RNA alone"] > 0.95 > scores["logistic_l2", "ATAC alone"]
    assert "| model | RNA+ATAC | RNA alone | ATAC alone |" in (tmp_path / "out" / "table.md").read_text()


def test_one_modality_cannot_be_compared(adata, recipe, tmp_path):
    adata.write_h5ad(tmp_path / "rna.h5ad")
    with pytest.raises(InputError, match="scbert combine"):
        run_benchmark("modalities", tmp_path / "rna.h5ad", "cell_type", tmp_path / "out", recipe=str(recipe))


def test_log_values_of_a_part_of_the_genes_are_taken_when_named(adata, recipe, tmp_path):
    adata.X.data = np.log1p(adata.X.data)
    adata.write_h5ad(tmp_path / "log.h5ad")
    given = ("cross-validation", tmp_path / "log.h5ad", "cell_type", tmp_path / "out")
    options = {"recipe": str(recipe), "baselines": "logistic_l2", "folds": 2}
    with pytest.raises(InputError, match="--values"):
        run_benchmark(*given, **options)
    result = run_benchmark(*given, **options, input="log1p")
    assert result["summary"][1]["macro_f1"] > 0.95


def test_features_keep_their_modality(cells_file):
    cells = load_benchmark_cells([cells_file], "cell_type")
    assert cells.var["feature_types"].value_counts().to_dict() == {"Gene Expression": 280, "Peaks": 20}
