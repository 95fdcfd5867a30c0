"""The threshold of "unassigned" that validation cells choose."""

import json

import numpy as np
import pytest

from scbert.tokenization import InputError
from scbert.training.run_finetune import finetune
from scbert.training.run_summary import threshold_of


def two_classes(confidences):
    confidences = np.asarray(confidences, dtype=float)
    return np.stack([confidences, 1 - confidences], axis=1)


def test_the_wanted_precision_is_reached():
    probabilities = two_classes([0.95] * 60 + [0.7] * 40)
    targets = np.array([0] * 60 + [0, 1] * 20)
    threshold = threshold_of(probabilities, targets, 0.95)
    assert 0.7 < threshold < 0.95
    assigned = probabilities.max(axis=1) >= threshold
    assert (targets[assigned] == 0).mean() >= 0.95
    assert threshold_of(probabilities, targets, 0.7) < 0.7


def test_it_is_never_below_a_half_and_none_where_there_is_nothing_to_choose_on():
    sure = two_classes([0.9] * 100)
    assert threshold_of(two_classes([0.4] * 100), np.ones(100, dtype=int), 0.9) >= 0.5
    assert threshold_of(sure[:10], np.zeros(10, dtype=int), 0.95) is None
    assert threshold_of(sure, np.ones(100, dtype=int), 0.95) is None


def test_it_stands_in_config_and_figures(adata, tiny_recipe, tmp_path):
    adata.write_h5ad(tmp_path / "r.h5ad")
    options = {
        "recipe": tiny_recipe,
        "validation_fraction": 0.5,
        "num_train_epochs": 8,
        "assigned_precision": 0.6,
    }
    summary = finetune(tmp_path / "r.h5ad", "cell_type", tmp_path / "model", **options)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["unassigned_threshold"] == summary["model"]["unassigned_threshold"]
    assert config["unassigned_threshold"] is None or config["unassigned_threshold"] >= 0.5
    assert 0 <= summary["test"]["assigned"]["share"] <= 1
    calibration = summary["test"]["calibration"]
    assert calibration["before"]["temperature"] == 1
    assert calibration["after"]["temperature"] == config["classifier_temperature"]
    with pytest.raises(InputError, match="assigned_precision"):
        finetune(tmp_path / "r.h5ad", "cell_type", tmp_path / "other", assigned_precision=0)
