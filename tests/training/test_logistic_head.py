"""Penalised regressions on principal axes, beside scikit-learn on the features themselves."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from scbert.training import averaging, logistic_head
from scbert.training.averaging import (
    DEFAULT_PENALTY,
    LOWEST_LOGIT,
    PENALTIES,
    Prior,
    choose_mixture,
    expected_temperature,
    some_cells,
)
from scbert.training.logistic_head import (
    POWERS,
    average,
    cross_fit,
    cross_folds,
    gene_scales,
    ridge_path,
    scaled_axes,
)
from scbert.training.principal_axes import axes_of_cells, column_means, inner_products


def test_products_dense_and_sparse_are_all_products():
    rng = np.random.default_rng(0)
    matrix = (rng.random((40, 300)) < np.linspace(0, 1, 300) ** 3).astype(np.float32)
    rows = sp.csr_matrix(matrix * rng.integers(1, 9, matrix.shape))
    np.testing.assert_allclose(inner_products(rows), (rows @ rows.T).toarray(), rtol=1e-5)


def test_sums_over_many_cells_keep_their_digits(monkeypatch):
    """Beyond 2^24 float32 cannot count; the values are summed in blocks."""
    monkeypatch.setattr("scbert.training.principal_axes.SUMMED_VALUES", 1)
    rows = sp.csr_matrix(np.array([[2.0**24, 0], [1, 3], [1, 0], [0, 3]], dtype=np.float32))
    assert column_means(rows).tolist() == [(2**24 + 2) / 4, 1.5]
    assert column_means(rows, power=2)[0] == (2**48 + 2) / 4


@pytest.mark.parametrize("learnt", [slice(None), slice(0, 60)])
@pytest.mark.parametrize("limit", [10_000, 10])
@pytest.mark.parametrize("rank", [3, 1000])
def test_weights_of_genes_give_what_coordinates_gave(cells, learnt, limit, rank, monkeypatch):
    """Both routes to the axes, for cells that the axes are of and others, and for the first axes alone."""
    monkeypatch.setattr("scbert.training.principal_axes.MAX_CELLS_BY_CELLS", limit)
    features, _ = cells
    mask = np.zeros(90, dtype=bool)
    mask[learnt] = True
    axes = axes_of_cells(features, mask).first(rank)
    rng = np.random.default_rng(1)
    coefficients, bias = rng.normal(size=(3, axes.coordinates.shape[1])), rng.normal(size=3)
    weights, intercept = axes.gene_weights(coefficients, bias)
    np.testing.assert_allclose(
        features @ weights.T + intercept, axes.coordinates @ coefficients.T + bias, rtol=1e-3, atol=2e-3
    )


def test_scaled_axes_come_back_to_the_features(cells):
    features, targets = cells
    learnt = np.arange(90) < 60
    axes = scaled_axes(features, targets, learnt, 1.0)
    coefficients = np.random.default_rng(1).normal(size=(2, axes.coordinates.shape[1]))
    weights, bias = axes.gene_weights(coefficients, np.zeros(2))
    np.testing.assert_allclose(
        features @ weights.T + bias, axes.coordinates @ coefficients.T, rtol=1e-3, atol=1e-3
    )


def test_a_path_is_ridge_regression_on_the_genes(cells):
    """Reference: scikit-learn on the centered features, with the intercept as a column of its own."""
    features, targets = cells
    axes = axes_of_cells(features)
    ((coefficients, bias),) = ridge_path(axes.coordinates, targets, 3, (3.0,))
    dense = features.toarray().astype(np.float64)
    dense -= dense.mean(axis=0)
    unit = (dense**2).sum(axis=1).mean() / 100
    size = 0.1 * (100 * unit * 30) ** 0.5
    model = LogisticRegression(C=1 / (3 * unit), fit_intercept=False, tol=1e-8, max_iter=5000)
    model.fit(np.column_stack([dense, np.full(90, size)]), targets)
    expected = model.predict_proba(np.column_stack([dense, np.full(90, size)]))
    np.testing.assert_allclose(softmax(axes.coordinates @ coefficients.T + bias, axis=1), expected, atol=0.01)


def test_classes_without_cells_are_never_said(cells):
    features, targets = cells
    ((coefficients, bias),) = ridge_path(axes_of_cells(features).coordinates, targets, 5, (3.0,))
    assert (coefficients[3:] == 0).all() and (bias[3:] == LOWEST_LOGIT).all()
    ((coefficients, bias),) = ridge_path(
        axes_of_cells(features).coordinates, np.ones(90, dtype=int), 2, (3.0,)
    )
    assert bias.tolist() == [LOWEST_LOGIT, 0]


def test_held_out_logits_have_seen_nothing_of_their_cell(cells):
    """Another label for a cell changes no fit that its own fold is asked of."""
    features, targets = cells
    folds = cross_folds(targets)
    changed = targets.copy()
    changed[7] = (targets[7] + 1) % 3
    axes, same_fold = axes_of_cells(features), folds == folds[7]
    for power in POWERS:
        first, second = (cross_fit(features, t, 3, folds, power, axes).logits for t in (targets, changed))
        np.testing.assert_array_equal(first[:, same_fold], second[:, same_fold])
        assert np.abs(first - second).max() > 1e-3


def test_of_an_atlas_some_cells_choose_and_all_are_learnt_from(cells, monkeypatch):
    """The head is that of a fit on all cells, whose path ends at the penalty that is asked for."""
    features, targets = cells
    folds, axes = cross_folds(targets), axes_of_cells(features)
    everyone = cross_fit(features, targets, 3, folds, 0.0, axes)
    for module in (logistic_head, averaging):
        monkeypatch.setattr(module, "some_cells", partial(some_cells, most=40, a_type=5))
    monkeypatch.setattr(logistic_head, "MOST_CELLS", 40)
    taught, told = [], []

    def path(coordinates, *others):
        for found in ridge_path(coordinates, *others):
            taught.append(len(coordinates))
            yield found

    monkeypatch.setattr(logistic_head, "ridge_path", path)
    some = cross_fit(features, targets, 3, folds, 0.0, axes, lambda: told.append(len(taught)))
    assert taught == [40] * 5 * len(PENALTIES)
    assert (some.logits[2].argmax(axis=1) == targets).mean() > 0.8
    for found, wanted in zip(some.head(2), everyone.head(2)):
        np.testing.assert_array_equal(found, wanted)
    assert taught[5 * len(PENALTIES) :] == [90] * 3
    # a bar moves while they are made
    assert told[-3:] == [len(taught) - 2, len(taught) - 1, len(taught)]
    assert (average([some], targets, folds).logits.argmax(axis=1) == targets).mean() > 0.8


def test_no_type_is_left_out_though_there_are_many():
    targets = np.repeat(np.arange(30), [1] * 15 + [20] * 15)
    drawn = some_cells(targets, targets != 3, most=60, a_type=10)
    assert drawn.sum() == 60 and set(targets[drawn]) == set(range(30)) - {3}


def test_fits_at_the_same_time_do_not_limit_threads_within_each_other(cells, monkeypatch):
    """The limit is the process's; how many have set it is counted."""
    features, targets = cells
    given = features, targets, 3, cross_folds(targets), 0.0, axes_of_cells(features)
    inside, seen = [], []

    @contextlib.contextmanager
    def limits(n_threads):
        inside.append(n_threads)
        time.sleep(0.1)
        seen.append(len(inside))
        yield
        inside.pop()

    monkeypatch.setattr(logistic_head, "threadpool_limits", limits)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: cross_fit(*given), range(2)))
    assert seen == [1, 1]


def test_fits_that_stop_short_of_the_end_are_none_of_the_users_business(cells, monkeypatch, recwarn):
    features, targets = cells
    monkeypatch.setattr(
        logistic_head, "LogisticRegression", lambda **o: LogisticRegression(**o | {"max_iter": 1})
    )
    cross_fit(features, targets, 3, cross_folds(targets), 0.0, axes_of_cells(features))
    assert not [warning for warning in recwarn if "converge" in str(warning.message)]


def test_scales_prefer_genes_that_tell_classes_apart(cells):
    features, targets = cells
    scales = gene_scales(features, targets, 1.0)
    assert set(np.argsort(-scales)[:3]) == {0, 1, 2}
    assert gene_scales(features, targets, 1.0).max() == 1


def test_without_evidence_the_prior_decides():
    """One cell a class: no penalty is better than another, and no certainty is asked for."""
    targets = np.arange(4)
    members = [np.random.default_rng(0).normal(size=(7, 4, 4)) for _ in range(3)]
    mixture = choose_mixture(
        members, targets, np.ones(4, dtype=bool), [Prior(expected_temperature(power)) for power in POWERS]
    )
    assert [PENALTIES[place] for place in mixture.places] == [DEFAULT_PENALTY] * 3
    np.testing.assert_allclose(mixture.shares, 1 / 3, atol=1e-4)
    assert mixture.temperatures.min() > 0.1 and mixture.temperatures.max() < 2


def test_many_cells_overrule_what_was_thought_of_a_member():
    rng, priors = np.random.default_rng(0), [Prior(-1.0, 0.1), Prior(-1.0, 1.9)]
    shares = {}
    for n_cells in (2, 400):
        targets = np.arange(n_cells) % 2
        # the first knows the classes better than the second
        members = [
            np.repeat([how_well * np.eye(2)[targets] + rng.normal(size=(n_cells, 2))], len(PENALTIES), axis=0)
            for how_well in (3.0, 1.0)
        ]
        shares[n_cells] = choose_mixture(members, targets, np.ones(n_cells, dtype=bool), priors).shares
    np.testing.assert_allclose(shares[2], [0.05, 0.95], atol=1e-3)
    assert shares[400][0] > 0.55


def test_of_penalties_as_good_the_strongest_is_chosen():
    """The likeliest is weaker by far; few cells cannot tell what that costs."""
    rng = np.random.default_rng(0)
    places, priors = {}, [Prior(expected_temperature(0.0))]
    for n_cells in (20, 4000):
        targets = np.arange(n_cells) % 2
        signs = np.where(np.eye(2)[targets] > 0, 1, -1)
        sure = rng.normal(signs, 0.3, size=(n_cells, 2))
        # right as often, less likely; and what is wrong more often
        blurred = np.sign(sure) * rng.gamma(0.3, 2.0, size=(n_cells, 1))
        wrong = rng.normal(signs, 3.0, size=(n_cells, 2))
        logits = np.stack([wrong, *[blurred] * 3, sure, sure, sure])
        mixture = choose_mixture([logits], targets, np.ones(n_cells, dtype=bool), priors)
        places[n_cells] = PENALTIES[mixture.places[0]]
    assert places[20] <= DEFAULT_PENALTY and places[4000] == 100


def test_cells_of_rare_classes_weigh_more():
    """Reference: scikit-learn with weights for the samples."""
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], [60, 25, 5])
    coordinates = (rng.normal(size=(90, 6)) + 2 * np.eye(3, 6)[targets]).astype(np.float32)
    ((coefficients, bias),) = ridge_path(coordinates, targets, 3, (3.0,))
    unit = float((coordinates**2).sum(axis=1).mean()) / 100
    size = 0.1 * (100 * unit * 30) ** 0.5
    weights = np.array([60, 25, 5])[targets] ** -0.5
    model = LogisticRegression(C=1 / (3 * unit), fit_intercept=False, tol=1e-8, max_iter=5000)
    features = np.column_stack([coordinates, np.full(90, size)])
    model.fit(features, targets, sample_weight=weights * 90 / weights.sum())
    expected = model.predict_proba(features)
    np.testing.assert_allclose(softmax(coordinates @ coefficients.T + bias, axis=1), expected, atol=0.01)
