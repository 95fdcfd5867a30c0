"""Regressions that do not lean on what studies differ in."""

import shutil

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from safetensors.torch import save_file

from scbert.api.train_models import finetune
from scbert.tokenization import InputError
from scbert.trained_model.model_folder import find_model, load_tokenizer
from scbert.training.initial_model import EFFECTS, pretrained_effects
from scbert.training.logistic_head import ridge_path, scaled_axes
from scbert.training.principal_axes import (
    Damping,
    axes_and_products,
    axes_of_cells,
    in_units_of,
    mean_squared_norm,
)


@pytest.fixture
def effects():
    return np.random.default_rng(1).normal(size=(4, 200))


def damping_matrix(effects, features):
    """The slow way: an inverse square root of a matrix of all genes."""
    squared = np.eye(effects.shape[1]) + effects.T @ effects / mean_squared_norm(features)
    values, vectors = np.linalg.eigh(squared)
    return vectors / np.sqrt(values) @ vectors.T


def test_damping_is_the_inverse_square_root(cells, effects):
    features, _ = cells
    damping, matrix = Damping.of(effects, features), damping_matrix(effects, features)
    weights = np.random.default_rng(2).normal(size=(5, 200))
    np.testing.assert_allclose(damping.weights(weights), weights @ matrix, atol=1e-9)
    damped = features @ matrix
    products = (features @ features.T).toarray() - damping.products(features)
    np.testing.assert_allclose(products, damped @ damped.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("limit", [10_000, 10])
def test_axes_are_those_of_damped_features(cells, effects, limit, monkeypatch):
    """By inner products and by the covariance of genes; and the way back is to weights of features as they are."""
    monkeypatch.setattr("scbert.training.principal_axes.MAX_CELLS_BY_CELLS", limit)
    features, _ = cells
    damped = features @ damping_matrix(effects, features)
    damped -= damped.mean(axis=0)
    axes, _ = axes_and_products(features, effects)
    np.testing.assert_allclose(axes.coordinates @ axes.coordinates.T, damped @ damped.T, rtol=1e-3, atol=2e-2)
    coefficients = np.random.default_rng(3).normal(size=(3, axes.coordinates.shape[1]))
    weights, bias = axes.gene_weights(coefficients, np.ones(3))
    np.testing.assert_allclose(
        features @ weights.T + bias, axes.coordinates @ coefficients.T + 1, rtol=1e-3, atol=1e-2
    )


def test_regressions_do_not_lean_on_effects(cells, effects):
    """They lean less, and learn the labels all the same."""
    features, targets = cells
    every, leaning = np.ones(90, dtype=bool), []
    for given in (None, 10 * effects):
        axes = scaled_axes(features, targets, every, 1.0, given)
        ((coefficients, bias),) = ridge_path(axes.coordinates, targets, 3, (3.0,))
        weights, bias = axes.gene_weights(coefficients, bias)
        leaning.append(np.abs(weights @ effects.T).mean() / np.linalg.norm(weights))
        assert ((features @ weights.T + bias).argmax(axis=1) == targets).mean() > 0.95
    assert leaning[1] < 0.8 * leaning[0], leaning


def test_no_effects_change_nothing(cells):
    features, _ = cells
    none = np.zeros((2, 200))
    np.testing.assert_array_equal(
        axes_of_cells(features, effects=none).coordinates, axes_of_cells(features).coordinates
    )


def test_effects_come_in_units_of_the_cells(cells):
    features, _ = cells
    found = in_units_of(features, np.ones((1, 199)))
    twice = in_units_of(features * 2, np.ones((1, 199)))
    np.testing.assert_allclose(twice, 2 * found, rtol=1e-6)
    assert found.shape == (1, 200) and found[0, -1] == 0


@pytest.fixture
def genes():
    """Symbols that scbert-mini knows."""
    return load_tokenizer(find_model("scbert-mini")).gene_panel[:300]


@pytest.fixture
def confounded(genes):
    """A reference whose two types are of a run each, and cells of other runs: 40 genes tell the run, 6 the type."""
    rng = np.random.default_rng(0)

    def study(run_of_type, n=60):
        types = np.repeat([0, 1], n)
        rates = np.full((2 * n, 300), 0.6)
        rates[:, :3] += 1.5 * (types == 0)[:, None]
        rates[:, 3:6] += 1.5 * (types == 1)[:, None]
        rates[:, 100:140] *= np.array(run_of_type)[types][:, None]
        cells = AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
        cells.var_names, cells.obs["cell_type"] = genes, np.array(["first", "second"])[types]
        return cells

    return study((1.0, 3.0)), study((3.0, 1.0))


@pytest.fixture
def taught(tmp_path):
    """scbert-mini, whose folder says what runs differ in."""
    folder = shutil.copytree(find_model("scbert-mini"), tmp_path / "mini")
    effects = torch.zeros(1, len(load_tokenizer(folder).gene_panel))
    effects[0, 100:140] = 0.3
    save_file({"effects": effects}, folder / EFFECTS)
    return folder


def test_genes_are_found_by_their_names(taught, genes):
    effects = pretrained_effects(taught, ["no gene", *genes[::-1]])
    assert effects.shape == (1, 301) and effects[0, 0] == 0
    assert np.flatnonzero(effects[0]).tolist() == list(range(161, 201))
    (taught / EFFECTS).unlink()
    assert pretrained_effects(taught, genes) is None


@pytest.mark.parametrize(
    "tensors, fault",
    [({"effects": torch.zeros(1, 7)}, "one for each gene"), ({"other": torch.zeros(1)}, "no tensor")],
)
def test_a_file_of_something_else_is_refused(taught, genes, tensors, fault):
    save_file(tensors, taught / EFFECTS)
    with pytest.raises(InputError, match=fault):
        pretrained_effects(taught, genes)


def test_a_reference_with_a_run_a_type_names_cells_of_other_runs(confounded, taught):
    """The point of it all: the effect is known from elsewhere, and not leant on."""
    reference, query = confounded
    right = {}
    for name in ("", str(taught)):
        model = finetune(
            reference, "cell_type", input="counts", cell_axes=name, disable_tqdm=True, device="cpu"
        )
        found = model.annotate(query, input="counts", progress=False)
        types = np.array(model.labels)[found.obsm["scbert_probabilities"].argmax(axis=1)]
        right[name] = (types == query.obs["cell_type"]).mean()
    assert right[str(taught)] > 0.85 and right[""] < 0.5, right
