"""Scores with hand-worked numbers, and the same through the `evaluate` module."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from scbert.evaluation import cell_annotation_metric
from scbert.evaluation.cell_annotation_metric.annotation_scores import annotation_scores
from scbert.evaluation.metrics import classification_metrics, plot_confusion

TRUE = ["B", "B", "B", "T", "T", "NK"]
PREDICTED = ["B", "B", "T", "T", "unassigned", "T"]
# B: 2 of 2 right, 2 of 3 found -> F1 0.8.  T: 1 of 3 right, 1 of 2 found -> F1 0.4.  NK: nothing -> 0.
MACRO_F1 = (0.8 + 0.4 + 0.0) / 3
BALANCED = (2 / 3 + 1 / 2 + 0) / 3


def test_hand_worked_scores():
    scores = classification_metrics(TRUE, PREDICTED)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["macro_f1"] == pytest.approx(MACRO_F1)
    assert scores["balanced_accuracy"] == pytest.approx(BALANCED)
    assert scores["per_class"]["T"] == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(0.5),
        "f1": pytest.approx(0.4),
        "support": 2,
    }
    assert scores["confusion"] == {
        "labels": ["B", "NK", "T", "unassigned"],
        "matrix": [[2, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]],
    }


def test_labels_choose_the_classes_of_the_means():
    scores = annotation_scores(PREDICTED, TRUE, labels=["B", "T"])
    assert scores["macro_f1"] == pytest.approx((0.8 + 0.4) / 2)
    assert scores["accuracy"] == pytest.approx(0.5)
    assert scores["confusion"]["labels"] == ["B", "T", "NK", "unassigned"]


def test_a_class_without_cells_does_not_enter_the_balanced_accuracy():
    scores = annotation_scores(["B", "T"], ["B", "T"], labels=["B", "T", "NK"])
    assert scores["balanced_accuracy"] == 1.0
    assert scores["macro_f1"] == pytest.approx(2 / 3)


def test_integer_labels_stay_integers():
    scores = classification_metrics([0, 1, 1], [0, 1, 0])
    assert scores["confusion"]["labels"] == [0, 1]


@pytest.mark.parametrize("pair", [([], []), (["B"], ["B", "T"])])
def test_unequal_or_empty_lists_are_refused(pair):
    with pytest.raises(ValueError, match="one label per cell"):
        classification_metrics(*pair)


def test_the_evaluate_module_loads_from_its_folder_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluate = pytest.importorskip("evaluate")
    folder = Path(cell_annotation_metric.__file__).parent
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    short = metric.compute(predictions=PREDICTED, references=TRUE)
    assert short == {
        "accuracy": pytest.approx(0.5),
        "macro_f1": pytest.approx(MACRO_F1),
        "balanced_accuracy": pytest.approx(BALANCED),
    }
    full = metric.compute(predictions=PREDICTED, references=TRUE, details=True)
    assert full == classification_metrics(TRUE, PREDICTED)


def test_confusion_picture_leaves_out_rows_without_cells(tmp_path):
    figure = plot_confusion(
        classification_metrics(TRUE, PREDICTED)["confusion"], tmp_path / "c.png", "six cells"
    )
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["B  (3)", "NK  (1)", "T  (2)"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["B", "NK", "T", "unassigned"]
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_confusion_picture_of_many_types_is_no_larger(tmp_path, monkeypatch):
    monkeypatch.setattr("scbert.evaluation.metrics.MOST_PIXELS", 300)
    plot_confusion(classification_metrics(TRUE, PREDICTED)["confusion"], tmp_path / "c.png")
    # a margin round what is drawn
    assert max(imread(tmp_path / "c.png").shape) < 350
