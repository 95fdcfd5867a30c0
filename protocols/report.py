"""Pictures of a benchmark (scores with their baselines, confusion, reliability), and its report, one HTML file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.paths import atomic_path
from ..evaluation.calibration import plot_reliability
from ..evaluation.embedding_plot import plot_embedding, umap_of
from ..evaluation.metrics import classification_metrics, plot_confusion
from ..evaluation.report import Section, report_html
from ..evaluation.tables import TextTable
from ..extras import require
from .folds import Fold
from .methods import Outputs

CAPTIONS = {
    "scores.png": "Macro-F1 of every fold; baselines are grey.",
    "confusion.png": "Confusion of the model in question, folds pooled: rows are true types.",
    "reliability.png": "Reliability: accuracy against confidence.",
}


def plot_scores(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Every method's macro-F1 in the rows of `fold_scores`: a bar with its folds as points, or a line over settings."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    several = len(settings) > 1
    size = (6.4, 3.8 if several else 1.2 + 0.32 * len(models))
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for number, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        is_baseline = mine[0]["baseline"]
        # the model in question stands out, its baselines stay grey
        colour = str(0.25 + 0.09 * (number % 6)) if is_baseline else f"C{number}"
        if several:
            means = [np.mean([row["macro_f1"] for row in mine if row["setting"] == s]) for s in settings]
            line, marker = "--" if is_baseline else "-", "osD^vP"[number % 6]
            axes.plot(range(len(settings)), means, line, marker=marker, label=model, color=colour)
        else:
            values = [row["macro_f1"] for row in mine]
            axes.barh(number, np.mean(values), alpha=0.45, height=0.7, color=colour)
            axes.scatter(values, np.full(len(values), number), s=14, zorder=3, color=colour)
    if several:
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


def plot_one_setting(
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
    probabilities, targets = [], []
    for outputs, labels in runs:
        known = np.isin(labels, outputs.classes)
        targets.append(np.array([column[label] for label in labels[known]], dtype=int))
        # a fold may lack a type: probability 0
        whole = np.zeros((int(known.sum()), len(classes)))
        whole[:, [column[label] for label in outputs.classes]] = outputs.probabilities[known]
        probabilities.append(whole)
    plot_reliability(np.concatenate(probabilities), np.concatenate(targets), folder / "reliability.png")


def write_report(
    path: str | Path,
    folder: Path,
    tables: Sequence[TextTable],
    main: Sequence[tuple[Fold, Outputs, np.ndarray]],
    result: dict[str, Any],
    overwrite: bool,
) -> None:
    """
    Write one HTML file of what was run and found, with the pictures of `folder`.

    `main` holds fold, outputs and true types of the model in question; the last fold's test cells are drawn as a UMAP.
    """
    pictures = {text: folder / name for name, text in CAPTIONS.items() if (folder / name).is_file()}
    fold, outputs, true = main[-1]
    if outputs.embeddings is not None:
        panels = {"true type": true, "predicted type": outputs.predicted}
        caption = f"Test cells of the last fold ({fold.name}), UMAP of the model's embeddings."
        pictures[caption] = plot_embedding(umap_of(outputs.embeddings), panels)
    facts = {
        "protocol": result["protocol"],
        "cells": f"{result['cells']:,} of {result['genes']:,} genes",
        "types": ", ".join(f"{name} ({n:,})" for name, n in result["cells_per_type"].items()),
        "recipe": result["settings"]["recipe"],
        "base": result["settings"]["base"] or "none: random weights",
        "seconds": f"{result['seconds']:.0f}",
    }
    facts |= {f"version of {name}": version for name, version in result["versions"].items()}
    notes = sorted({f"{row['model']}: {note}" for row in result["rows"] for note in row["notes"]})
    sections = [
        Section("Scores", warnings=result["warnings"], tables=tables, sentences=notes),
        Section("Pictures", pictures=pictures),
        Section("How it was run", facts=facts),
    ]
    page = report_html(f"scBERT: {result['protocol']}", sections)
    with atomic_path(path, overwrite) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")
