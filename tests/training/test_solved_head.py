"""The default recipe: a head solved for by cross-fitted regressions, its confidence, what it says of new types."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scipy.special import softmax
from transformers import AutoModelForSequenceClassification

from scbert import ScBertTokenizer
from scbert.data.read import log_normalize
from scbert.inference import annotate
from scbert.tokenization import InputError
from scbert.trained_model.prediction import LoadedModel, predict_cells
from scbert.training.initial_model import new_model
from scbert.training.run_finetune import finetune
from scbert.training.settings import load_recipe
from scbert.training.solved_head import pooled_features, solve_classifier


@pytest.fixture
def blobs():
    """Counts of five types with markers of their own, 24 cells each, and a sixth that is none of them."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2.0, 120)
    profiles = np.stack([rates] * 6)
    for place, profile in enumerate(profiles):
        profile[place * 20 : place * 20 + 12] += 8
    types = np.repeat(np.arange(6), 24)
    cells = AnnData(sp.csr_matrix(rng.poisson(profiles[types]).astype(np.float32)))
    cells.var_names = [f"GENE{i}" for i in range(120)]
    cells.obs["cell_type"] = [f"type {number}" for number in types]
    return cells


@pytest.fixture
def solved(blobs, tmp_path):
    """A model of the first five types, and its summary."""
    reference = blobs[blobs.obs["cell_type"] != "type 5"].copy()
    summary = finetune(reference, "cell_type", tmp_path / "model", use_cpu=True, disable_tqdm=True, seed=1)
    return tmp_path / "model", summary, reference


def test_default_learns_from_every_cell_and_says_what_it_measured(solved):
    folder, summary, reference = solved
    assert summary["cells"] == {"train": reference.n_obs, "validation": 0, "test": 0}
    assert summary["estimate"] == "cross_validation"
    assert summary["cross_validation_accuracy"] > 0.95
    low, high = summary["cross_validation"]["accuracy_interval"]
    assert low <= np.mean(summary["cross_validation"]["accuracy_of_folds"]) <= high
    assert summary["baseline"]["cross_validation"]["cells"] == summary["cross_validation"]["cells"]
    assert summary["training"]["steps"] == 0
    assert json.loads((folder / "metrics.json").read_text())["solved_head"]["shares"]
    assert not (folder / "learning_curve.png").exists()


def test_the_baseline_is_judged_by_all_cells_though_it_learns_from_a_part(
    blobs, tmp_path, monkeypatch, caplog
):
    """In cross-validation; a class of few cells is among those it learns from."""
    monkeypatch.setattr("scbert.training.run_summary.MAX_BASELINE_CELLS", 60)
    monkeypatch.setattr("scbert.training.run_summary.BASELINE_CELLS_A_TYPE", 3)
    with caplog.at_level("INFO"):
        summary = finetune(
            blobs[:99].copy(), "cell_type", tmp_path / "model", use_cpu=True, disable_tqdm=True
        )
    baseline = summary["baseline"]["cross_validation"]
    assert baseline["cells"] == summary["cross_validation"]["cells"] == 99
    assert baseline["macro_f1"] > 0.9
    assert "(the baseline learnt from 60 of the 99 cells)" in caplog.text


def test_the_baseline_reads_each_file_by_its_own_kind(blobs, tmp_path):
    """Counts to learn from and log1p values to be tested on, or counts both times."""
    reference, test = blobs[::2].copy(), blobs[1::2].copy()
    logged = AnnData(log_normalize(test)[0], obs=test.obs, var=test.var)
    first, second = (
        finetune(reference, "cell_type", tmp_path / name, test=part, use_cpu=True, disable_tqdm=True)
        for name, part in (("counts", test), ("logs", logged))
    )
    scores = [summary["baseline"]["test"]["mean_confidence"] for summary in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_new_type_is_unassigned_and_known_ones_are_not(solved, blobs):
    annotated = annotate(blobs, model=solved[0], progress=False)
    unassigned = (annotated.obs["scbert_cell_type"] == "unassigned").to_numpy()
    novel = (blobs.obs["cell_type"] == "type 5").to_numpy()
    assert unassigned[novel].mean() > 0.8
    assert unassigned[~novel].mean() < 0.15


def test_a_model_of_ensembl_ids_takes_files_that_have_symbols_as_well(blobs, tmp_path):
    """Learnt from ids alone; asked and tested with a column of symbols, and with other versions."""
    blobs.var_names = [f"ENSG{number:011d}.3" for number in range(blobs.n_vars)]
    others = blobs.copy()
    others.var_names = [name.replace(".3", ".7") for name in blobs.var_names]
    others.var["feature_name"] = [f"GENE{number}" for number in range(blobs.n_vars)]
    options = {"use_cpu": True, "disable_tqdm": True}
    summary = finetune(blobs, "cell_type", tmp_path / "model", test=others, **options)
    assert summary["test_accuracy"] > 0.9 and summary["baseline_test_accuracy"] > 0.9
    answers = [annotate(cells.copy(), model=tmp_path / "model", progress=False) for cells in (blobs, others)]
    np.testing.assert_array_equal(*(cells.obsm["scbert_probabilities"] for cells in answers))


def test_probabilities_are_the_models_own(solved, blobs):
    annotated = annotate(blobs, model=solved[0], progress=False)
    model = AutoModelForSequenceClassification.from_pretrained(solved[0]).eval()
    tokenizer = ScBertTokenizer.from_pretrained(solved[0])
    inputs = {
        name: torch.from_numpy(array)
        for name, array in tokenizer.encode_bins(tokenizer.bin_cells(blobs)).items()
    }
    with torch.no_grad():
        outputs = model(**inputs)
    np.testing.assert_allclose(
        annotated.obsm["scbert_probabilities"], outputs.probabilities.numpy(), rtol=1e-4, atol=1e-6
    )
    share = outputs.probabilities / outputs.logits.softmax(-1)
    assert (share.max(dim=1).values - share.min(dim=1).values).max() < 1e-4
    assert outputs.cell_vectors.shape == (blobs.n_obs, model.config.cell_vector_size)
    assert model.train()(**inputs).probabilities is None


def test_cross_fitted_confidence_is_that_of_cells_not_seen(blobs):
    """Half of the cells teach; what cross-fitting says of them holds for the other half."""
    rng = np.random.default_rng(1)
    # labels of which a part is wrong: certainty would be punished
    targets = np.unique(blobs.obs["cell_type"], return_inverse=True)[1]
    wrong = rng.random(blobs.n_obs) < 0.25
    targets = np.where(wrong, rng.integers(0, 6, blobs.n_obs), targets)
    tokenizer = ScBertTokenizer(gene_panel=list(blobs.var_names), **load_recipe("default")["tokenizer"])
    bins, half = tokenizer.bin_cells(blobs), np.arange(blobs.n_obs) % 2 == 0
    loaded = LoadedModel(new_model(load_recipe("default")["model"], tokenizer, list("abcdef"), 0), tokenizer)
    held_out = solve_classifier(loaded, bins[half], targets[half])
    seen = softmax(predict_cells(loaded, bins[~half])["logits"], axis=1)
    accuracy = (seen.argmax(axis=1) == targets[~half]).mean()
    assert 0.6 < accuracy < 0.95
    assert abs(seen.max(axis=1).mean() - accuracy) < 0.12
    assert abs(held_out.probabilities.max(axis=1).mean() - seen.max(axis=1).mean()) < 0.12


def test_features_are_the_bins(blobs):
    recipe = load_recipe("default")
    tokenizer = ScBertTokenizer(gene_panel=list(blobs.var_names), **recipe["tokenizer"])
    loaded = LoadedModel(new_model(recipe["model"], tokenizer, ["a", "b"], 0), tokenizer)
    bins = tokenizer.bin_cells(blobs)
    features = pooled_features(loaded, bins)[:, :-1]
    np.testing.assert_allclose(features.toarray(), bins.toarray(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_cells", [1, 2, 5])
def test_any_number_of_cells_a_class(blobs, tmp_path, n_cells):
    few = blobs[np.concatenate([np.arange(n_cells) + 24 * place for place in range(5)])].copy()
    summary = finetune(few, "cell_type", tmp_path / "model", use_cpu=True, disable_tqdm=True)
    assert summary["classes"] == [f"type {number}" for number in range(5)]
    assert (summary["estimate"] is None) == (n_cells == 1)
    others = blobs[: 5 * 24]
    annotated = annotate(others.copy(), model=tmp_path / "model", threshold=0, progress=False)
    assert (annotated.obs["scbert_cell_type"].astype(str) == others.obs["cell_type"]).mean() > 0.6


def test_a_class_of_one_cell_among_others_is_learnt(blobs, tmp_path):
    part = blobs[np.r_[0:48, 50]].copy()
    summary = finetune(part, "cell_type", tmp_path / "model", use_cpu=True, disable_tqdm=True)
    assert summary["data"]["small_classes"] == {"type 2": 1}
    assert summary["cross_validation"]["cells"] == 48


def test_a_split_is_kept_to(blobs, tmp_path):
    blobs.obs["split"] = np.where(np.arange(blobs.n_obs) % 4 == 0, "test", "train")
    summary = finetune(
        blobs, "cell_type", tmp_path / "model", test_key="split", use_cpu=True, disable_tqdm=True
    )
    assert summary["estimate"] == "test"
    assert summary["cells"] == {"train": 108, "validation": 0, "test": 36}
    assert summary["test_accuracy"] > 0.9 and summary["baseline_test_accuracy"] > 0.9


def test_equal_seeds_give_equal_weights(solved, tmp_path):
    folder, _, reference = solved
    finetune(reference, "cell_type", tmp_path / "again", use_cpu=True, disable_tqdm=True, seed=1)
    first, again = (
        AutoModelForSequenceClassification.from_pretrained(path).state_dict()
        for path in (folder, tmp_path / "again")
    )
    for name in first:
        torch.testing.assert_close(first[name], again[name], rtol=1e-4, atol=1e-5, msg=name)


def test_settings_of_steps_are_said_to_have_no_effect(blobs, tmp_path, caplog):
    finetune(blobs, "cell_type", tmp_path / "model", epochs=3, seed=1, use_cpu=True, disable_tqdm=True)
    assert "no effect" in caplog.text and "num_train_epochs" in caplog.text
    assert "seed" not in caplog.text


def test_a_solved_head_reads_the_genes_itself(reference, tmp_path):
    with pytest.raises(InputError, match="classifier_hidden_sizes"):
        finetune(reference, "cell_type", tmp_path / "m", model={"classifier_hidden_sizes": [8]})
