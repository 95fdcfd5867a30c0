"""One cell has one label and one confidence, whoever is asked: command, Python, pipeline, page, Auto classes."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import scbert
from scbert.commands.cli import main
from scbert.inference.upload import annotate_upload

THRESHOLD = 0.8


@pytest.fixture
def expected(adata, model_dir):
    return scbert.annotate(adata, model_dir, progress=False).obs


@pytest.fixture
def model_dir(make_model):
    return make_model(unassigned_threshold=THRESHOLD)


def by_command(query, model_dir, tmp_path):
    output = str(tmp_path / "annotated.csv")
    assert main(["annotate", str(query), "--model", str(model_dir), "--output", output]) == 0
    table = pd.read_csv(output, index_col="cell")
    return table["scbert_cell_type"], table["scbert_confidence"]


def by_model(query, model_dir, tmp_path):
    obs = scbert.load_model(model_dir).annotate(anndata.read_h5ad(query), progress=False).obs
    return obs["scbert_cell_type"], obs["scbert_confidence"]


def by_page(query, model_dir, tmp_path):
    annotated = annotate_upload(query, model_dir, tmp_path)
    return annotated.labels, annotated.confidence


def by_pipeline(query, model_dir, tmp_path):
    answers = pipeline("cell-type-annotation", model=str(model_dir))(anndata.read_h5ad(query))
    first = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    return [cell["label"] for cell in first], [cell["score"] for cell in first]


def by_auto_classes(query, model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    with torch.no_grad():
        outputs = model(**tokenizer(anndata.read_h5ad(query), return_tensors="pt"))
    confidence, label = outputs.probabilities.max(-1)
    names = [model.config.id2label[int(i)] for i in label]
    known = confidence >= model.config.unassigned_threshold
    return [name if sure else "unassigned" for name, sure in zip(names, known)], confidence.numpy()


@pytest.mark.parametrize("ask", [by_command, by_model, by_page, by_auto_classes, by_pipeline])
def test_one_answer(ask, expected, query, model_dir, tmp_path):
    labels, confidence = ask(query, model_dir, tmp_path)
    assert 0 < (expected["scbert_cell_type"] == "unassigned").sum() < len(expected)
    assert list(labels) == list(expected["scbert_cell_type"])
    np.testing.assert_allclose(confidence, expected["scbert_confidence"], rtol=1e-5, atol=1e-6)
