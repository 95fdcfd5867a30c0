import json
import re

import pytest
from huggingface_hub import ModelCard

from scbert.model_cards.card import build_card, public_metrics
from scbert.tokenization import InputError


@pytest.fixture
def text(model_folder):
    return str(build_card(model_folder, "somebody/pbmc-types", "cc-by-4.0"))


def test_every_section_is_there(text):
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings == [
        "How to use it", "Training data", "Results and baselines", "Limits", "Licence and citation",
    ]  # fmt: skip
    assert re.search(r"^# pbmc-types$", text, flags=re.MULTILINE)
    assert "{{" not in text and "{%" not in text and "None" not in text


def test_metrics_are_eval_results(text):
    card = ModelCard(text)
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "transformers"
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["accuracy"].metric_value == 0.9375
    assert found["macro-F1"].metric_value == 0.875
    assert {result.dataset_split for result in found.values()} == {"test"}
    assert {result.dataset_name for result in found.values()} == {"pbmc"}


def test_scores_stand_beside_their_baseline(text):
    assert re.search(r"^\| this model \| 0\.9375 \| 0\.8750 \| 0\.9000 \|$", text, flags=re.MULTILINE)
    assert re.search(
        r"^\| baseline: logistic regression.* \| 0\.9500 \| 0\.9100 \|", text, flags=re.MULTILINE
    )
    assert "the baseline, logistic regression, has the higher macro-F1" in text
    # one row per cell type; a bar in a name breaks no table
    assert re.search(r"^\| B\\\|cell \| 5 \| 0\.8000 \| 0\.9000 \| 0\.8500 \|$", text, flags=re.MULTILINE)
    assert "单核细胞" in text


def test_data_limits_and_licence(text):
    assert "`pbmc`: 80 train, 20 validation, 16 test cells." in text
    assert "7 unlabelled cells were left out." in text
    assert "platelet" in text
    assert "no others" in text and "not for diagnosis" in text
    assert "`cc-by-4.0`" in text
    assert "10.1038/s42256-022-00534-z" in text
    assert 'pipeline("cell-type-annotation", model="somebody/pbmc-types", trust_remote_code=True)' in text


def test_nothing_private_is_told(text):
    assert "/home" not in text and "secret-project" not in text and "hf_" not in text
    cleaned = public_metrics(
        {"settings": {"hub_token": "hf_x", "deep": [{"path": "/a/b.h5ad", "epochs": 3}]}}
    )
    assert cleaned == {"settings": {"deep": [{"path": "b.h5ad", "epochs": 3}]}}
    near = {"reference": "ward_7/cells.h5ad", "unlabelled": ["../ann/more.h5ad"], "base": "owner/model"}
    known = {"reference": "cells.h5ad", "unlabelled": ["more.h5ad"], "base": "owner/model"}
    assert public_metrics({"settings": near}) == {"settings": known}


def test_without_metrics_it_says_so(model_folder):
    (model_folder / "metrics.json").unlink()
    text = str(build_card(model_folder, "somebody/pbmc"))
    assert "Not recorded in this folder" in text and "None were measured" in text
    assert ModelCard(text).data.eval_results is None


def test_without_a_test_split_validation_is_named_as_such(model_folder):
    metrics = json.loads((model_folder / "metrics.json").read_text(encoding="utf-8"))
    del metrics["test"]
    (model_folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = str(build_card(model_folder, "somebody/pbmc"))
    assert "Validation on" in text and "not a test" in text
    assert {result.dataset_split for result in ModelCard(text).data.eval_results} == {"validation"}


def test_a_pretrained_encoder(model_folder):
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["ScBertForMaskedExpression"]
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    metrics = {
        "loss": 0.71,
        "masked_accuracy": 0.78,
        "baseline_masked_accuracy": 0.72,
        "cell_baseline_masked_accuracy": 0.75,
        "cells": {"train": 900},
    }
    metrics |= {"data": {"files": {"a.h5ad": {"cells": 900}}}, "settings": {"corpus": "/data/blood"}}
    (model_folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = str(build_card(model_folder, "somebody/pretrained"))
    assert 'pipeline("cell-embedding"' in text and "Cell types, in the order" not in text
    assert re.search(r"^\| masked accuracy \| 0\.7800 \| 0\.7200 \| 0\.7500 \|$", text, flags=re.MULTILINE)
    assert ModelCard(text).data.eval_results[0].metric_value == 0.78


def test_damaged_figures_are_refused(model_folder):
    (model_folder / "metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.json cannot be read"):
        build_card(model_folder, "somebody/pbmc")
