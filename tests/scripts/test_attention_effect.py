"""What attention adds: a layer that starts at nothing, heads that have not seen the cell, the rule."""

import json

import numpy as np
import pytest
import torch

import attention_effect
import attention_layer
from attention_effect import rows_of, write_page
from attention_layer import WAYS, Heads, build, gain, measure, recipe, solve, train_layers
from scbert.training.finetune_data import load_data
from scbert.training.solved_head import pooled_features, solve_classifier


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def data(adata, monkeypatch):
    """Three fifths of the cells in training, a fifth each in validation and test."""
    monkeypatch.setattr(attention_layer, "TOP_GENES", 100)
    adata.obs["label"] = adata.obs["cell_type"].astype(str)
    adata.obs["split"] = np.resize(["train", "test", "train", "validation", "train"], adata.n_obs)
    arguments, tokenizer, _, seed = recipe(0)
    return load_data(arguments, tokenizer, seed, reference=adata)


@pytest.mark.parametrize("way", ["correction", "two_layers"])
def test_a_start_from_zero_is_the_reference(data, way):
    bins = data.splits["test"].bins
    reference = pooled_features(build(WAYS["reference"], data), bins).toarray()
    assert reference.max() > 1
    np.testing.assert_allclose(pooled_features(build(WAYS[way], data), bins).toarray(), reference, atol=1e-4)
    assert abs(pooled_features(build(WAYS["random"], data), bins) - reference).max() > 0.1


def test_without_an_epoch_the_scores_are_those_of_the_reference(data, monkeypatch):
    monkeypatch.setattr(attention_layer, "EPOCHS", 0)
    reference, corrected = (measure(WAYS[way], data) for way in ("reference", "crossed"))
    assert corrected["chosen"] == 0 and not corrected["validation"]["keep"]
    np.testing.assert_allclose(corrected["losses"], reference["losses"], atol=1e-3)


def test_the_reference_is_the_default_recipes_head(data):
    learnt, loaded = data.splits["train"], build(WAYS["reference"], data)
    weights, bias = solve(pooled_features(loaded, learnt.bins), learnt.targets, len(data.classes))
    solve_classifier(loaded, learnt.bins, learnt.targets)
    layer = loaded.model.classifier.out_proj
    np.testing.assert_allclose(layer.weight.detach().numpy(), weights, atol=1e-6)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, atol=1e-6)


@pytest.mark.parametrize("way, attends", [("crossed", True), ("correction", True), ("feed_forward", False)])
def test_training_leaves_nothing_but_the_layers_changed(data, way, attends, monkeypatch):
    monkeypatch.setattr(attention_layer, "EPOCHS", 1)
    # the epoch is taken whatever the validation cells say
    losses = iter([np.ones(24), np.zeros(24)])
    monkeypatch.setattr(Heads, "losses", lambda *_: next(losses))
    loaded = build(WAYS[way], data)
    before = attention_layer.copy_of(loaded.model)
    assert train_layers(loaded, data, WAYS[way])["chosen"] == 1
    changed = {name for name, value in loaded.model.state_dict().items() if not value.equal(before[name])}
    assert changed and all(name.startswith("scbert.layers.") for name in changed)
    assert ("scbert.layers.0.attention.o_proj.weight" in changed) == attends
    assert "scbert.layers.0.output.weight" in changed


def test_a_crossed_head_has_not_seen_the_cell(data):
    train = data.splits["train"]
    features = pooled_features(build(WAYS["reference"], data), train.bins)
    heads = Heads(features, train.targets, len(data.classes), crossed=True)
    cells = np.flatnonzero(heads.parts == 1)
    weights, bias = solve(features[heads.parts != 1], train.targets[heads.parts != 1], len(data.classes))
    pooled = torch.from_numpy(features[cells].toarray())
    expected = pooled @ torch.from_numpy(weights).T + torch.from_numpy(bias)
    torch.testing.assert_close(heads(pooled, cells), expected, atol=1e-4, rtol=1e-4)
    assert not any(value.requires_grad for value in heads.parameters())


def test_the_rule_wants_more_than_a_standard_error():
    assert gain(np.array([2.0, 3.0]), np.array([1.0, 1.0])) == {"mean": 1.5, "error": 0.5, "keep": True}
    assert not gain(np.array([2.0, 1.0]), np.array([1.0, 1.0]))["keep"]
    assert not gain(np.ones(3), np.ones(3))["keep"]


def test_the_page_is_written_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_effect, "STUDIES", ("one",))
    for way, loss in (("reference", 0.4), ("correction", 0.39), ("crossed", 0.3), ("random", 0.5)):
        (tmp_path / way).mkdir()
        # of the random layer one fold is missing
        for fold in range(2 if way == "random" else 3):
            result = {"losses": [loss, loss + 0.1], "true": [0, 1], "predicted": [0, 1], "seconds": 2.0}
            if way == "crossed":
                result |= {"chosen": 3, "epochs": [], "validation": gain(np.ones(2), np.zeros(2))}
            if way == "correction":
                result |= {"chosen": 0, "epochs": [], "validation": gain(np.ones(2), np.ones(2))}
            (tmp_path / way / f"one.{fold}.json").write_text(json.dumps(result))
    rows = rows_of(tmp_path)
    assert [row["way"] for row in rows] == ["reference", "correction", "crossed"]
    # no training was kept: this is the reference, and not a rounding error better
    assert rows[1]["gain"] == {"mean": 0, "error": 0, "keep": False}
    assert rows[2]["gain"]["mean"] == pytest.approx(0.1) and rows[2]["cells"] == 6
    write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| one | 6 | one layer from zero, crossed | 0.3500 | 1.000 | 1.000 | +0.1000" in text
    assert "3 of 3 | +0.1000" in text
    assert json.loads((tmp_path / "results" / "attention.json").read_text())["rows"] == rows
