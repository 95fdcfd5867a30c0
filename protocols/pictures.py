"""Pictures of a benchmark: scores with their baselines, confusion, reliability."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.calibration import plot_reliability
from ..evaluation.metrics import classification_metrics, plot_confusion
from ..extras import require
from .methods import Outputs


def plot_scores(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Any:
    """Every method's macro-F1 in the rows of `fold_scores`: a bar with its folds as points, or a line over settings."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    size = (6.4, 3.8) if len(settings) > 1 else (6.4, 1.2 + 0.32 * len(models))
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        # the model in question stands out, its baselines stay grey
        style = (
            {"color": f"C{number}"} if not mine[0]["baseline"] else {"color": str(0.25 + 0.09 * (number % 6))}
        )
        if len(settings) > 1:
            means = [
                np.mean([row["macro_f1"] for row in mine if row["setting"] == s] or [np.nan])
                for s in settings
            ]
            line = "-" if not mine[0]["baseline"] else "--"
            axes.plot(range(len(settings)), means, line, marker="osD^vP"[number % 6], label=model, **style)
        else:
            values = [row["macro_f1"] for row in mine]
            axes.barh(number, np.mean(values), alpha=0.45, height=0.7, **style)
            axes.scatter(values, np.full(len(values), number), s=14, zorder=3, **style)
    if len(settings) > 1:
        axes.set_xticks(range(len(settings)), settings, rotation=20, ha="right", fontsize=8)
        axes.set_ylabel("macro-F1")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.set_yticks(range(len(models)), models, fontsize=8)
        axes.invert_yaxis()
        lowest = min(row["macro_f1"] for row in rows)
        axes.set_xlim(max(0.0, np.floor(lowest * 10) / 10 - 0.1), 1)
        axes.set_xlabel("macro-F1")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return figure


def plot_first_setting(
    runs: Sequence[tuple[Outputs, np.ndarray]], classes: list[str], folder: Path, title: str
) -> None:
    """
    Confusion and reliability of the model in question, its folds pooled, into ``confusion.png``, ``reliability.png``.

    `runs` are the outputs and true types of the test cells of every fold.
    """
    true = np.concatenate([labels for _, labels in runs])
    predicted = np.concatenate([outputs.predicted for outputs, _ in runs])
    plot_confusion(classification_metrics(true, predicted)["confusion"], folder / "confusion.png", title)
    if any(outputs.logits is None for outputs, _ in runs):
        return
    column = {name: number for number, name in enumerate(classes)}
    curves, targets = [], []
    for outputs, labels in runs:
        known = np.isin(labels, outputs.classes)
        targets.append(np.array([column[label] for label in labels[known]], dtype=int))
        # a fold may lack a type: probability 0
        whole = np.zeros((int(known.sum()), len(classes)))
        whole[:, [column[label] for label in outputs.classes]] = outputs.probabilities[known]
        curves.append(whole)
    plot_reliability(np.concatenate(curves), np.concatenate(targets), folder / "reliability.png")
