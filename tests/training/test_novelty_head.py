"""What tells novel cells: distances in units of a type's scatter, fitted on types left out in turn."""

import numpy as np
import scipy.sparse as sp
from scipy.special import expit

from scbert.training.logistic_head import cross_folds
from scbert.training.novelty_head import (
    KNOWN_SHARE,
    MIN_CELLS,
    Simulated,
    choose_threshold,
    fit_novelty,
    novelty_facts,
    simulate,
    type_centers,
    whitened,
)
from scbert.training.principal_axes import axes_of_cells


def cells_of_types(n_types=5, n_cells=30, n_genes=150, seed=0):
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(n_types), n_cells)
    rates = 0.5 + 4 * np.eye(n_types)[targets] @ np.kron(
        np.eye(n_types, n_types), np.ones((1, n_genes // n_types))
    )
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32)), targets


def test_whitened_scatter_within_types_is_one():
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], 500)
    coordinates = rng.normal(size=(1000, 3)) * [3.0, 1.0, 0.7] + 10 * targets[:, None]
    vectors, whitener = whitened(coordinates, targets)
    within = vectors - type_centers(vectors, targets)[targets]
    np.testing.assert_allclose(within.T @ within / 1000, np.eye(3), atol=0.15)
    np.testing.assert_allclose(coordinates @ whitener, vectors)


def test_facts_grow_with_distance_from_types_and_lack_of_evidence():
    centers = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    logits = np.array([[5.0, 0.0], [0.5, 0.0]])
    near, far = novelty_facts(logits, np.array([[1.1, 0.0], [0.0, 3.0]]), centers)
    assert (far > near).all()


def test_what_is_farther_from_everything_is_no_more_novel():
    """A shift of all cells stretches both distances."""
    centers = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    vectors = np.array([[1.0, 0.0, 5.0], [1.0, 0.0, 50.0]])
    facts = novelty_facts(np.zeros((2, 2)), vectors, centers)
    assert (np.abs(facts[:, 1]) < 0.1).all()


def test_left_out_types_are_told_from_known_ones():
    features, targets = cells_of_types()
    simulated = simulate(axes_of_cells(features), None, features, targets, cross_folds(targets), 8)
    assert len(simulated) == 5
    novelty = fit_novelty(simulated)
    odds = [one.facts @ novelty[1:] + novelty[0] for one in simulated]
    known = np.concatenate([x[~one.novel] for x, one in zip(odds, simulated)])
    novel = np.concatenate([x[one.novel] for x, one in zip(odds, simulated)])
    assert novel.mean() > known.mean()
    np.testing.assert_allclose(expit(-known).mean(), KNOWN_SHARE, atol=1e-3)
    threshold = choose_threshold(simulated, novelty)
    assert 0.3 <= threshold <= 0.98


def test_types_with_few_cells_and_few_types_are_not_left_out():
    features, targets = cells_of_types(n_types=5, n_cells=MIN_CELLS - 1)
    assert simulate(axes_of_cells(features), None, features, targets, cross_folds(targets), 8) == []
    features, targets = cells_of_types(n_types=2)
    assert simulate(axes_of_cells(features), None, features, targets, cross_folds(targets), 8) == []


def test_facts_that_tell_nothing_leave_all_cells_known():
    rng = np.random.default_rng(0)
    novel = np.arange(200) % 2 == 0
    # known cells are the farther ones: no slope may be negative
    facts = np.stack([rng.normal(size=200), np.where(novel, -1.0, 1.0)], axis=1)
    facts[:, 0] = facts[:, 1]
    simulated = [Simulated(novel, ~novel, np.full(200, 0.9), facts)]
    assert fit_novelty(simulated).tolist() == [-30.0, 0.0, 0.0]
