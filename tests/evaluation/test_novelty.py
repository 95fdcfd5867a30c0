"""Novelty scores and their measures with hand-worked numbers."""

import math

import numpy as np
import pytest

from scbert.evaluation.novelty import (
    energy_score,
    entropy_score,
    mahalanobis_score,
    max_probability_score,
    neighbour_score,
    novel_type_metrics,
    novelty_auroc,
    reject,
)


def test_novel_type_metrics_by_hand():
    #        known, right | known, wrong | known, thrown out | novel, found | novel, missed
    true = ["B", "B", "T", "B", "T", "T", "NK", "NK", "NK"]
    pred = ["B", "B", "T", "T", "unassigned", "unassigned", "unassigned", "B", "T"]
    scores = novel_type_metrics(true, pred, known_labels=["B", "T"])
    assert scores["known_accuracy"] == pytest.approx(3 / 6)
    # truly novel: 3 cells, predicted novel: 3 cells, both: 1, union: 5.
    assert scores["novel_accuracy"] == pytest.approx(1 / 5)
    assert scores["novel_recall"] == pytest.approx(1 / 3)
    assert scores["novel_precision"] == pytest.approx(1 / 3)
    assert scores["assigned_accuracy"] == pytest.approx(3 / 6)
    assert (scores["n_known"], scores["n_novel"], scores["n_predicted_novel"]) == (6, 3, 3)


def test_nothing_novel_and_nothing_rejected_is_not_a_number():
    scores = novel_type_metrics(["B"], ["B"], ["B"])
    assert scores["known_accuracy"] == 1.0 and math.isnan(scores["novel_accuracy"])


def test_a_true_label_that_says_unassigned_is_novel_and_right_only_when_rejected():
    scores = novel_type_metrics(["unassigned", "B"], ["unassigned", "B"], ["B"])
    assert scores["novel_accuracy"] == 1.0


def test_scores_of_outputs_by_hand():
    probabilities = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert max_probability_score(probabilities).tolist() == [0.5, 0.0]
    assert entropy_score(probabilities) == pytest.approx([1.5 * np.log(2) / np.log(3), 0.0])
    assert energy_score(np.log(np.array([[1.0, 3.0]]))) == pytest.approx([-np.log(4)])


def test_entropy_grows_with_the_probability_of_no_type():
    scores = entropy_score(np.array([[0.5, 0.5], [0.4, 0.4], [0.3, 0.3]]))
    assert scores[0] == pytest.approx(1) and (np.diff(scores) > 0).all()


def test_energy_tells_no_class_from_two_classes():
    neither, both = np.array([[-3.0, -3.0]]), np.array([[6.0, 6.0]])
    assert energy_score(neither)[0] > energy_score(both)[0]


def test_mahalanobis_distance_with_a_known_covariance():
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 3.0])
    labels = np.repeat(["B", "T"], 20_000)
    centres = np.where(labels[:, None] == "B", [0.0, 0.0], [20.0, 0.0])
    train = rng.normal(size=(40_000, 2)) * scale + centres
    # 2 standard deviations along either axis, from either mean: squared distance 4.
    scores = mahalanobis_score(train, labels, np.array([[2.0, 0.0], [0.0, 6.0], [20.0, -6.0]]))
    assert scores == pytest.approx([4.0, 4.0, 4.0], rel=0.05)


def test_mahalanobis_survives_a_constant_dimension_and_few_cells():
    train = np.array([[0.0, 5.0, 1.0], [1.0, 5.0, 1.0]])
    scores = mahalanobis_score(train, ["B", "B"], np.array([[0.5, 5.0, 1.0], [9.0, 5.0, 1.0]]))
    assert np.isfinite(scores).all()


def test_neighbour_distance_is_to_the_kth_on_the_unit_sphere():
    train = np.array([[1.0, 0.0], [10.0, 0.0], [0.0, 1.0]])
    query = np.array([[2.0, 0.0]])
    assert neighbour_score(train, query, 2) == pytest.approx([0.0])
    assert neighbour_score(train, query, 3) == pytest.approx([2**0.5])
    assert neighbour_score(train, query, 50) == pytest.approx([2**0.5])


def test_auroc_and_rejection():
    # of the 2 x 2 pairs, one ties (half) and three are in order.
    assert novelty_auroc(np.array([0.1, 0.4, 0.4, 0.8]), [0, 0, 1, 1]) == pytest.approx(3.5 / 4)
    assert math.isnan(novelty_auroc(np.array([0.1, 0.2]), [0, 0]))
    assert reject(["B", "T", "B"], np.array([8.0, 9.0, 9.5]), 9.0).tolist() == ["B", "T", "unassigned"]
