"""A tiny fine-tuned model with the figures `scbert finetune` leaves beside it."""

import json

import pytest

from scbert import ScBertConfig, ScBertForCellClassification, ScBertTokenizer

LABELS = ["B|cell", "CD8+/CD45RA+ T", "单核细胞"]
SCORES = {"accuracy": 0.9375, "macro_f1": 0.875, "balanced_accuracy": 0.9}
METRICS = {
    "test_accuracy": 0.9375,
    "cells": {"train": 80, "validation": 20, "test": 16},
    "classes": LABELS,
    "data": {"unlabelled": 7, "small_classes": {"platelet": 2}},
    "model": {"parameters": 12345},
    "validation": {"cells": 20, **SCORES},
    "test": {
        "cells": 16,
        **SCORES,
        "per_class": {name: {"precision": 0.8, "recall": 0.9, "f1": 0.85, "support": 5} for name in LABELS},
    },
    "baseline": {
        "name": "logistic regression (L2, log1p CP10k)",
        "test": {"accuracy": 0.95, "macro_f1": 0.91},
    },
    "settings": {"reference": "/home/somebody/secret-project/pbmc.h5ad", "hub_token": "hf_abcdefgh"},
    "versions": {"torch": "2.13.0"},
    "notes": ["the baseline, logistic regression, has the higher macro-F1 on the test cells"],
}


@pytest.fixture
def tiny(gene_panel):
    """Model and tokenizer in memory."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = ScBertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, intermediate_size=32,
        num_random_features=8, max_position_embeddings=301, classifier_hidden_sizes=[8], **names,
    )  # fmt: skip
    return ScBertForCellClassification(config), ScBertTokenizer(gene_panel=gene_panel)


@pytest.fixture
def model_folder(tiny, tmp_path):
    """The same in a folder, with metrics.json and some things that are nobody else's."""
    folder = tmp_path / "model"
    for part in tiny:
        part.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    (folder / "training_args.bin").write_bytes(b"hf_abcdefgh")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "cells.h5ad").write_bytes(b"private")
    return folder
