"""The threshold of "unassigned" that validation cells choose."""

import json

import numpy as np

from scbert.evaluation.calibration import fit_temperature
from scbert.inference import annotate
from scbert.training.finetune_trainer import TEMPERATURE_PRIOR, threshold_of
from scbert.training.run_finetune import finetune


def two_classes(confidences):
    confidences = np.asarray(confidences, dtype=float)
    return np.stack([confidences, 1 - confidences], axis=1)


def test_the_wanted_precision_is_reached():
    probabilities = two_classes([0.95] * 60 + [0.7] * 40)
    targets = np.array([0] * 60 + [0, 1] * 20)
    threshold = threshold_of(probabilities, targets)
    assert 0.7 < threshold < 0.95
    assigned = probabilities.max(axis=1) >= threshold
    assert (targets[assigned] == 0).mean() >= 0.95


def test_it_is_never_below_a_half_and_none_where_there_is_nothing_to_choose_on():
    sure = two_classes([0.9] * 100)
    assert threshold_of(two_classes([0.4] * 100), np.ones(100, dtype=int)) >= 0.5
    assert threshold_of(sure[:10], np.zeros(10, dtype=int)) is None
    assert threshold_of(sure, np.ones(100, dtype=int)) is None


def test_it_stands_in_config_and_figures(adata, tiny_recipe, tmp_path):
    adata.write_h5ad(tmp_path / "r.h5ad")
    options = {
        "recipe": tiny_recipe,
        "validation_fraction": 0.5,
        "num_train_epochs": 8,
    }
    summary = finetune(tmp_path / "r.h5ad", "cell_type", tmp_path / "model", **options)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["unassigned_threshold"] == summary["model"]["unassigned_threshold"]
    assert config["unassigned_threshold"] is None or config["unassigned_threshold"] >= 0.5
    assert 0 <= summary["test"]["assigned"]["share"] <= 1
    assert 0 <= summary["test"]["ece"] <= 1


def test_the_temperature_is_in_the_weights(adata, tiny_recipe, tmp_path):
    adata.obs["split"] = ["train"] * 60 + ["validation"] * 30 + ["test"] * 30
    adata.write_h5ad(tmp_path / "r.h5ad")
    summary = finetune(
        tmp_path / "r.h5ad", "cell_type", tmp_path / "model", recipe=tiny_recipe, test_key="split"
    )
    annotated = annotate(adata[90:].copy(), model=tmp_path / "model", progress=False)
    confidence = annotated.obs["scbert_confidence"].mean()
    assert abs(confidence - summary["test"]["mean_confidence"]) < 1e-4


def test_few_or_easy_cells_do_not_ask_for_certainty():
    # all right: the likelihood alone would send the temperature to its bound
    logits, prior = np.array([[4.0, 0.0]] * 20), TEMPERATURE_PRIOR
    assert 0.3 < fit_temperature(logits, np.zeros(20, dtype=int), prior=prior) < 1
    assert 1 < fit_temperature(logits, np.ones(20, dtype=int), prior=prior) < 20
