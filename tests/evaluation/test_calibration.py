"""Temperature, calibration errors and thresholds with hand-worked numbers."""

import numpy as np
import pytest
from sklearn.metrics import log_loss

from scbert.evaluation.calibration import (
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    plot_reliability,
    softmax,
)

FOUR = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
FOUR_LABELS = np.array([0, 1, 0, 1])


def test_temperature_of_a_worked_case():
    # every cell says "class 0, margin 4" and three in four are right: the best margin is log 3.
    logits = np.tile([4.0, 0.0], (4, 1))
    assert fit_temperature(logits, np.array([0, 0, 0, 1])) == pytest.approx(4 / np.log(3), rel=1e-4)


def test_a_known_temperature_is_found_again():
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(20_000, 4)) * 2
    labels = (softmax(honest).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    temperature = fit_temperature(honest * 3, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    before, after = (softmax(honest * 3, divisor) for divisor in (1.0, temperature))
    assert expected_calibration_error(after, labels) < 0.02 < expected_calibration_error(before, labels)
    assert log_loss(labels, after) < log_loss(labels, before)


def test_a_prior_keeps_a_few_sure_cells_from_certainty():
    logits, labels = np.array([[4.0, 0.0]] * 5), np.zeros(5, dtype=int)
    alone, with_prior = fit_temperature(logits, labels), fit_temperature(logits, labels, prior=3.0)
    assert alone < 0.1 < with_prior < 1


def test_calibration_errors_by_hand():
    # one cell per bin: gaps 0.1, 0.8, 0.4, 0.3.
    assert expected_calibration_error(FOUR, FOUR_LABELS, n_bins=10) == pytest.approx(0.4)


def test_certain_cells_share_the_last_bin():
    sure = np.array([[1.0, 0.0]] * 4 + [[0.95, 0.05]] * 4)
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 0])
    # 7 of 8 are right, at a mean confidence of 0.975
    assert expected_calibration_error(sure, labels) == pytest.approx(0.1)
    # cells without any probability are of no class, and say so
    nothing = np.zeros((4, 2)), np.zeros(4, dtype=int)
    both = (np.concatenate(pair) for pair in zip((sure, labels), nothing))
    assert expected_calibration_error(*both) == pytest.approx(0.1 * 8 / 12)
    # a rounding above 1 changes nothing
    assert expected_calibration_error(sure + 1e-9, labels) == pytest.approx(0.1, abs=1e-6)


def test_softmax_of_large_logits():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]


def test_threshold_is_the_lowest_that_reaches_the_precision():
    confidence = np.array([0.95, 0.9, 0.85, 0.8, 0.7, 0.6])
    labels = np.array([0, 0, 1, 0, 0, 1])  # precision from the top: 1, 1, 2/3, 3/4, 4/5, 4/6
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    chosen = choose_threshold(probabilities, labels, precision=0.8, min_cells=1)
    assert chosen == pytest.approx(0.65)
    strict = choose_threshold(probabilities, labels, precision=0.95, min_cells=1)
    assert strict == pytest.approx(0.875)


def test_threshold_keeps_cells_of_equal_confidence_together():
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3]])
    chosen = choose_threshold(probabilities, np.array([0, 0, 1]), precision=1.0, min_cells=1)
    assert chosen == pytest.approx(0.8)


def test_threshold_counts_cells_of_no_class_as_wrong():
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3]])
    assert choose_threshold(probabilities, np.array([0, -1]), 1.0, min_cells=1) == pytest.approx(0.8)


def test_threshold_when_everything_is_right_or_nothing_is():
    assert choose_threshold(FOUR, FOUR.argmax(axis=1), min_cells=1) < 0.6
    assert choose_threshold(FOUR, 1 - FOUR.argmax(axis=1), min_cells=1) is None
    assert choose_threshold(np.zeros((0, 2)), np.zeros(0, dtype=int)) is None


def test_wrong_labels_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_temperature(FOUR, np.array([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="one class index per cell"):
        fit_temperature(FOUR, np.array([0, 1]))


def test_reliability_picture(tmp_path):
    figure = plot_reliability(FOUR, FOUR_LABELS, tmp_path / "r.png")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[1].startswith("model (ECE 0.4")
    assert (tmp_path / "r.png").stat().st_size > 5000
