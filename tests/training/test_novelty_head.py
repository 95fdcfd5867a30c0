"""What tells novel cells: distances in units of a type's scatter, against those of held-out cells."""

import numpy as np
import pytest
import scipy.sparse as sp

from scbert.training.logistic_head import cross_folds
from scbert.training.novelty_head import (
    ENOUGH_CELLS,
    KNOWN_SHARE,
    MIN_CELLS,
    MOST_LOST,
    all_centers,
    choose_threshold,
    fit_novelty,
    held_out_distances,
    known_shares,
    novelty_of_cells,
    relative_distance,
    telling_cells,
    type_centers,
    whitened,
)
from scbert.training.principal_axes import axes_and_products, axes_by_products, inner_products


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


def test_distance_grows_with_the_way_to_the_nearest_type():
    centers = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    near, far = relative_distance(np.array([[1.1, 0.0], [0.0, 3.0]]), centers)
    assert far > near


def test_what_is_farther_from_everything_is_hardly_more_novel():
    """A shift of all cells, across what tells types apart, adds as much to both distances: a fourth of it is left."""
    centers = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    own, shifted = relative_distance(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 50.0]]), centers)
    assert shifted - own == pytest.approx(50.0**2 / 4)


def test_held_out_distances_are_those_of_new_cells_of_known_types():
    """Half of the cells, held out by folds, against the other half by what the first half says of itself."""
    features, targets = cells_of_types(n_cells=60)
    first = np.arange(len(targets)) % 2 == 0
    learnt, index = features[first], targets[first]
    axes, products = axes_and_products(learnt)
    distances = held_out_distances(axes, products, learnt, index, cross_folds(index), 8)
    both = axes_by_products(inner_products(features), features, first, rank=8)
    vectors, whitener = whitened(both.coordinates[first], index)
    new = relative_distance(both.coordinates[~first] @ whitener, all_centers(vectors, index))
    assert abs(np.median(new) - np.median(distances)) < 0.5 * distances.std()


def test_known_cells_stay_known_and_a_type_left_out_does_not():
    features, targets = cells_of_types(n_cells=60)
    for left in range(5):
        known = targets != left
        learnt, index = features[known], np.unique(targets[known], return_inverse=True)[1]
        axes, products = axes_and_products(learnt)
        distances = held_out_distances(axes, products, learnt, index, cross_folds(index), 8)
        odds = fit_novelty(distances)
        kept = known_shares(distances, odds)
        np.testing.assert_allclose(kept.mean(), KNOWN_SHARE, atol=1e-3)
        assert np.median(kept) > 0.999
        of_all = axes_by_products(inner_products(features), features, known, rank=8)
        vectors, whitener = whitened(of_all.coordinates[known], index)
        novel = relative_distance(of_all.coordinates[~known] @ whitener, all_centers(vectors, index))
        assert (known_shares(novel, odds, threshold=0.61) == 0.6).mean() > 0.9


def test_a_new_type_is_told_beside_one_that_most_cells_are_of():
    """The mean of all cells is then that of the common type, and being as far from both says something."""
    features, targets = cells_of_types(n_cells=200)
    kept = (targets == 0) | (np.arange(len(targets)) % 20 == 0)
    features, targets = features[kept], targets[kept]
    known = targets != 4
    axes, products = axes_and_products(features[known])
    distances = held_out_distances(
        axes, products, features[known], targets[known], cross_folds(targets[known]), 8
    )
    of_all = axes_by_products(inner_products(features), features, known, rank=8)
    vectors, whitener = whitened(of_all.coordinates[known], targets[known])
    novel = relative_distance(of_all.coordinates[~known] @ whitener, all_centers(vectors, targets[known]))
    assert np.mean(known_shares(novel, fit_novelty(distances)) < 0.5) > 0.9


def test_the_very_cells_learnt_from_are_known():
    """Along axes of noise they lie farther from their type than other cells do: fewer axes are taken."""
    rng = np.random.default_rng(0)
    targets = np.arange(200) % 2
    features = sp.csr_matrix(
        rng.poisson(1 + 0.5 * np.outer(targets, np.arange(1000) < 60)).astype(np.float32)
    )
    (axes, products), told = axes_and_products(features), telling_cells(targets)
    folds = cross_folds(targets)
    n_axes, _, odds = novelty_of_cells(axes, products, features, targets, folds, 32, told)
    vectors, _ = whitened(axes.coordinates[:, :n_axes], targets)
    own = relative_distance(vectors, all_centers(vectors, targets))
    assert n_axes < 32 and (known_shares(own, odds) < 0.5).mean() < 0.2
    features, targets = cells_of_types(n_cells=200)
    (axes, products), told = axes_and_products(features), telling_cells(targets)
    folds = cross_folds(targets)
    assert novelty_of_cells(axes, products, features, targets, folds, 8, told)[0] == 8


def test_distances_that_are_all_alike_say_nothing():
    odds = fit_novelty(np.full(50, -3.0))
    assert (known_shares(np.array([-3.0, 0.0, 1e6]), odds) == 1).all()


def test_few_cells_and_types_of_few_cells_do_not_tell():
    assert not telling_cells(np.repeat(np.arange(5), MIN_CELLS - 1)).any()
    assert not telling_cells(np.repeat(np.arange(ENOUGH_CELLS // MIN_CELLS - 1), MIN_CELLS)).any()
    told = telling_cells(np.repeat([0, 1], [ENOUGH_CELLS, MIN_CELLS - 1]))
    assert told[:ENOUGH_CELLS].all() and not told[ENOUGH_CELLS:].any()


def test_the_threshold_loses_few_right_cells():
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, size=2000)
    right = rng.random(2000) < confidence
    threshold = choose_threshold(confidence, right)
    lost = (right & (confidence < threshold)).mean()
    higher = (right & (confidence < threshold + 0.02)).mean()
    assert 0.3 < threshold < 0.98 and lost <= MOST_LOST < higher


def test_the_floor_changes_no_decision_by_the_threshold():
    """A cell that lies far off keeps too little for a name, and no less than that."""
    rng = np.random.default_rng(0)
    largest, distances = rng.beta(9, 1, size=2000), rng.normal(size=2000)
    largest[:10] = 1.0
    odds = fit_novelty(distances)
    confidence = largest * known_shares(distances, odds)
    threshold = choose_threshold(confidence, rng.random(2000) < 0.9)
    floored = largest * known_shares(distances, odds, threshold)
    np.testing.assert_array_equal(floored < threshold, confidence < threshold)
    assert (floored >= confidence).all() and floored.min() > 0.2 > confidence.min()
