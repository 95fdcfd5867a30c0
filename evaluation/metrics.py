"""Scores of predicted cell types against true ones, and their confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require


def classification_metrics(
    y_true: Sequence, y_pred: Sequence, labels: Sequence | None = None
) -> dict[str, Any]:
    """
    Accuracy, macro-F1, balanced accuracy, per-class scores and the confusion matrix.

    Parameters
    ----------
    y_true
        True labels, [cells].
    y_pred
        Predicted labels, [cells]; may hold values that are no true label, such as ``"unassigned"``.
    labels
        The classes the averages run over, in the order of the tables. Default: the classes that occur in
        `y_true`, sorted. A predicted value outside it (``"unassigned"``) is a miss of the cell's true class,
        but no class of its own, so it does not drag a meaningless F1 of 0 into the mean.

    Returns
    -------
    dict
        - ``accuracy``: share of cells whose prediction equals the truth;
        - ``macro_f1``: plain mean of the F1 of every class in `labels`;
        - ``balanced_accuracy``: mean recall of the classes of `labels` that have at least one cell;
        - ``per_class``: ``{label: {"precision", "recall", "f1", "support"}}``;
        - ``confusion``: ``{"labels": [...], "matrix": [[...]]}``, rows true, columns predicted; its labels
          are `labels` followed by any other value seen, sorted.

        Everything is a plain Python number or list, so that it can be written as JSON.

    Raises
    ------
    ValueError
        When the two differ in length, or are empty.

    Notes
    -----
    Computed by scikit-learn; macro-F1 as in Yang et al. 2022.

    Examples
    --------
    >>> scores = classification_metrics(["B", "B", "T", "T"], ["B", "T", "T", "unassigned"])
    >>> scores["accuracy"], round(scores["macro_f1"], 3), scores["confusion"]["labels"]
    (0.5, 0.583, ['B', 'T', 'unassigned'])
    """
    true, predicted = np.asarray(y_true), np.asarray(y_pred)
    if true.shape != predicted.shape or true.ndim != 1 or not len(true):
        raise ValueError(
            "y_true and y_pred must be two non-empty lists of one label per cell; "
            f"got shapes {true.shape} and {predicted.shape}"
        )
    if true.dtype.kind in "OUS" or predicted.dtype.kind in "OUS":
        true, predicted = true.astype(str), predicted.astype(str)
    classes = None if labels is None else np.asarray(labels).astype(true.dtype.kind).tolist()
    # scikit-learn takes a second to import: only when something is scored.
    from .cell_annotation_metric.annotation_scores import annotation_scores

    return annotation_scores(predicted.tolist(), true.tolist(), classes)


def plot_confusion(
    confusion: dict[str, Any], path: str | Path | None = None, title: str | None = None
) -> Any:
    """
    Draw a confusion matrix: rows are true types, colour is the share of the row, numbers are cells.

    Parameters
    ----------
    confusion
        The ``"confusion"`` entry of `classification_metrics`: ``{"labels": [k], "matrix": [k][k]}``.
    path
        Where to save the picture (the ending chooses the format); nothing is saved when None.
    title
        Text above the picture.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> scores = classification_metrics(["B", "B", "T"], ["B", "T", "T"])
    >>> figure = plot_confusion(scores["confusion"], "confusion.png")
    """
    figure_module = require("matplotlib.figure")
    labels = [str(label) for label in confusion["labels"]]
    counts = np.asarray(confusion["matrix"])
    totals = counts.sum(axis=1, keepdims=True)
    keep = (counts.sum(axis=1) + counts.sum(axis=0)) > 0
    # a row that is never true (such as "unassigned") would be an empty stripe: drawn as a column only.
    rows, columns = np.flatnonzero(totals[:, 0] > 0), np.flatnonzero(keep)
    share = (counts / np.maximum(totals, 1))[np.ix_(rows, columns)]
    side = 0.36 * len(columns) + 2.6, 0.36 * len(rows) + 2.2
    figure = figure_module.Figure(figsize=(max(side[0], 4.2), max(side[1], 3.4)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if counts[row, column]:
                colour = "white" if share[i, j] > 0.55 else "#222222"
                axes.text(j, i, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(
        range(len(columns)), [_short(labels[j]) for j in columns], rotation=45, ha="right", fontsize=8
    )
    axes.xaxis.set_tick_params(rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [f"{_short(labels[i])}  ({totals[i, 0]})" for i in rows], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (cells)")
    axes.set_title(title or "", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the true type", shrink=0.8)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _short(label: str, limit: int = 28) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"
