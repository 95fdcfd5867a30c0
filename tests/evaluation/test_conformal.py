"""Prediction sets: coverage by simulation, against p-values counted one by one, and with few cells."""

import numpy as np
import pytest
from scipy.special import softmax

from scbert.evaluation.calibration import MIN_CLASS_CELLS, conformal_quantiles, in_set


def simulated(n_cells, seed, shares=(0.5, 0.3, 0.2), too_sure=1.0):
    """Cells of three overlapping types, and probabilities of a model that may be too sure of itself."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(len(shares), n_cells, p=shares)
    places = np.eye(len(shares))[targets] * 1.5 + rng.normal(size=(n_cells, len(shares)))
    return softmax(too_sure * (1.5 * places + np.log(shares)), axis=1), targets


def covered(members, targets):
    return members[np.arange(len(targets)), targets]


@pytest.mark.parametrize("too_sure", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95, 0.99])
def test_coverage_is_what_was_asked_for(coverage, too_sure):
    """Whatever the model thinks of itself, in the whole and in each type."""
    new, true = simulated(20_000, 1, too_sure=too_sure)
    found = []
    for seed in range(10):
        quantiles = conformal_quantiles(*simulated(1000, 100 + seed, too_sure=too_sure), (coverage,))
        found.append(covered(in_set(new, quantiles[f"{coverage:g}"]), true))
    found = np.mean(found, axis=0)
    assert abs(found.mean() - coverage) < 0.02
    for name in range(3):
        assert abs(found[true == name].mean() - coverage) < 0.02


def test_the_finite_sample_share():
    """With n cells of a class, exactly rank / (n + 1) of new ones are covered in the mean."""
    n_cells, coverage, rng = 25, 0.9, np.random.default_rng(0)
    right = rng.uniform(size=(4000, n_cells + 1))
    found = []
    for draw in right:
        probabilities = np.column_stack([draw, 1 - draw])
        quantiles = conformal_quantiles(probabilities[:-1], np.zeros(n_cells, dtype=int), (coverage,))["0.9"]
        found.append(in_set(probabilities[-1:], quantiles)[0, 0])
    assert np.mean(found) == pytest.approx(24 / 26, abs=0.015)


@pytest.mark.parametrize("n_cells", [99, 150, 400])
def test_sets_are_those_of_p_values_counted_one_by_one(n_cells):
    probabilities, targets = simulated(n_cells, 2, shares=(0.4, 0.35, 0.25))
    probabilities = np.round(probabilities, 2).astype(np.float32)
    new = np.round(simulated(50, 3)[0], 2).astype(np.float32)
    coverage = 0.9
    assert np.bincount(targets).min() >= MIN_CLASS_CELLS
    members = in_set(new, conformal_quantiles(probabilities, targets, (coverage,))["0.9"])
    for cell in range(len(new)):
        for name in range(3):
            own = 1 - probabilities[targets == name, name]
            as_odd = 1 + np.sum(own >= 1 - new[cell, name])
            # a label is left out where at most 1 - coverage of its cells are as odd as this one
            kept = as_odd / (len(own) + 1) > 1 - coverage + 1e-6 and new[cell, name] > 0
            assert members[cell, name] == kept


def test_small_classes_share_a_quantile_and_large_ones_keep_theirs():
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], [200, 15, 15])
    probabilities = np.zeros((230, 3))
    probabilities[np.arange(230), targets] = np.where(
        targets == 0, rng.uniform(0.9, 1, 230), rng.uniform(0.2, 0.5, 230)
    )
    quantiles = conformal_quantiles(probabilities, targets, (0.9, 0.99))
    large, small, other = quantiles["0.9"]
    assert large < 0.1 and small == other > 0.5
    # 30 cells are too few for 0.99: all cells together say it
    everything = np.sort(1 - probabilities[np.arange(230), targets].astype(np.float32))
    large, small, other = quantiles["0.99"]
    assert large < 0.1 and small == other == pytest.approx(everything[229 - 1])


def test_coverages_that_need_more_cells_are_left_out():
    probabilities, targets = simulated(30, 0)
    assert list(conformal_quantiles(probabilities, targets)) == ["0.8", "0.9", "0.95"]
    assert conformal_quantiles(probabilities[:2], targets[:2]) == {}


def test_a_class_without_cells_has_a_quantile_all_the_same():
    probabilities, targets = simulated(300, 0)
    wider = np.column_stack([probabilities, np.zeros(300)])
    assert np.isfinite(conformal_quantiles(wider, targets)["0.9"]).all()


def test_certain_cells_are_no_trap_of_rounding():
    """A probability that float32 calls 1 is as good as any other such."""
    probabilities = np.column_stack([1 - np.logspace(-12, -9, 50), np.logspace(-12, -9, 50)])
    quantiles = conformal_quantiles(probabilities, np.zeros(50, dtype=int))["0.9"]
    assert in_set(np.array([[1 - 1e-8, 1e-8]], dtype=np.float32), quantiles)[0, 0]


def test_a_cell_without_expression_has_an_empty_set():
    assert not in_set(np.zeros((1, 2)), [1.0, 1.0]).any()
