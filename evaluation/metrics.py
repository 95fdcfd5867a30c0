"""Scores of predicted cell types against true ones, and their confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require

# of either side of a picture: hundreds of types at full size would take gigabytes to draw
MOST_PIXELS = 4000


def classification_metrics(y_true: Sequence, y_pred: Sequence) -> dict[str, Any]:
    """
    Accuracy, macro-F1, balanced accuracy, per-class scores and the confusion matrix of labels [cells], JSON-ready.

    The means run over the classes that occur in `y_true`. Another predicted value (``"unassigned"``) is a miss of the
    cell's true class, but no class of its own, so it does not drag a meaningless F1 of 0 into the mean.

    - ``accuracy``: share of cells whose prediction equals the truth;
    - ``macro_f1``: plain mean of the F1 of every class, as in Yang et al. 2022;
    - ``balanced_accuracy``: mean recall of the classes;
    - ``per_class``: ``{label: {"precision", "recall", "f1", "support"}}``;
    - ``confusion``: ``{"labels": [...], "matrix": [[...]]}``, rows true, columns predicted; its labels
      are the classes, sorted, followed by any other value seen, sorted.

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
    # scikit-learn takes a second to import: only when something is scored.
    from .cell_annotation_metric.annotation_scores import annotation_scores

    return annotation_scores(predicted.tolist(), true.tolist())


def plot_confusion(confusion: dict[str, Any], path: str | Path, title: str = "") -> Any:
    """
    Draw a confusion matrix: rows are true types, colour is the share of the row, numbers are cells.

    `confusion` is that of `classification_metrics`. Saved as `path` (the ending chooses the format), and returned as
    matplotlib's Figure.
    """
    labels = [shortened(str(label), 28) for label in confusion["labels"]]
    counts = np.asarray(confusion["matrix"])
    totals = counts.sum(axis=1, keepdims=True)
    keep = (counts.sum(axis=1) + counts.sum(axis=0)) > 0
    # a row that is never true (such as "unassigned") would be an empty stripe: drawn as a column only.
    rows, columns = np.flatnonzero(totals[:, 0] > 0), np.flatnonzero(keep)
    share = (counts / np.maximum(totals, 1))[np.ix_(rows, columns)]
    size = max(0.36 * len(columns) + 2.6, 4.2), max(0.36 * len(rows) + 2.2, 3.4)
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if counts[row, column]:
                colour = "white" if share[i, j] > 0.55 else "#222222"
                axes.text(j, i, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=colour)
    names = [labels[j] for j in columns]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8, rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [f"{labels[i]}  ({totals[i, 0]})" for i in rows], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (cells)")
    # over the whole picture: over the matrix alone the colour bar would cover its end
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the true type", shrink=0.8)
    figure.savefig(path, dpi=min(150, MOST_PIXELS / max(size)), bbox_inches="tight")
    return figure


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis, at most `limit` characters, for pictures: a dollar is no formula."""
    return (text if len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")
