"""A tiny recipe and a labelled reference file for fine-tuning."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch

torch.set_num_threads(1)  # the models are far too small for two

TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_random_features": 16,
    "classifier_hidden_sizes": [],
    # large weights at the start: a few steps must be enough
    "initializer_range": 0.2,
}
TINY_TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def tiny_recipe(tmp_path):
    """Path of a recipe whose training takes a second."""
    path = tmp_path / "tiny.json"
    tokenizer = {"keep_zeros": False}
    path.write_text(json.dumps({"model": TINY_MODEL, "tokenizer": tokenizer, "training": TINY_TRAINING}))
    return path


@pytest.fixture
def reference(adata, tmp_path):
    """Path of a labelled .h5ad file."""
    path = tmp_path / "reference.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture
def cells():
    """Features of 90 cells of three types, and their types."""
    rng = np.random.default_rng(0)
    targets = np.arange(90) % 3
    rates = 0.4 + 3 * np.eye(3)[targets] @ np.eye(3, 200)
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32)), targets
