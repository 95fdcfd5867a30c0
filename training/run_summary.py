"""Figures of a fine-tuning run: scores of every split beside a baseline, the summary, pictures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..evaluation.baselines import LogisticRegressionBaseline
from ..evaluation.calibration import calibration_metrics, choose_threshold, fit_temperature, softmax
from ..evaluation.metrics import classification_metrics, plot_confusion
from ..evaluation.requirements import require
from ..extras import versions
from .finetune_data import FinetuneData, LabelledCells

# the baseline is a yardstick, not the job: past this many training cells it learns from a random part
MAX_BASELINE_CELLS = 10_000
MIN_CELLS_FOR_TEMPERATURE = 50
TEMPERATURES = (0.2, 10.0)
# scBERT's threshold of "unassigned"; a chosen one is never lower, for types nobody taught end up below it
DEFAULT_THRESHOLD = 0.5
BASELINE_GRID = (0.01, 0.1, 1.0)


@dataclass
class TunedModel:
    """
    A model as fine-tuning left it, by whatever way: what is scored and summarised.

    Attributes
    ----------
    model
        With its best weights.
    state
        Steps and history; empty where nothing was trained in steps.
    logits_of
        Logits of some cells, [cells, classes]. On several processes all of them must ask.
    weights
        All weights by name; asked for by every process, since under FSDP each holds a part.
    """

    model: PreTrainedModel
    state: TrainerState
    logits_of: Callable[[LabelledCells], np.ndarray]
    weights: Callable[[], dict[str, torch.Tensor]]


def score_splits(
    tuned: TunedModel, data: FinetuneData, assigned_precision: float
) -> dict[str, dict[str, Any]]:
    """
    Scores on validation and, once, on test; temperature and threshold, fitted on validation, go into the config.

    Parameters
    ----------
    tuned
        The model.
    data
        Splits.
    assigned_precision
        See `threshold_of`.

    Returns
    -------
    dict
        Split -> scores, with ``calibration`` before and after the temperature (where torchmetrics is installed)
        and what the threshold of "unassigned" does; a split without cells is left out. On several processes all
        of them must call this.
    """
    scores, config = {}, tuned.model.config
    for name in ("validation", "test"):
        part = data.splits[name]
        if not len(part):
            continue
        logits = tuned.logits_of(part)
        scores[name] = _scores(part.targets, logits.argmax(axis=-1), data.classes)
        if name == "validation":
            config.classifier_temperature = temperature_of(logits, part.targets)
            probabilities = softmax(logits, config.classifier_temperature)
            config.unassigned_threshold = threshold_of(probabilities, part.targets, assigned_precision)
        scores[name] |= _confidence_scores(logits, part.targets, config)
    return scores


def threshold_of(probabilities: np.ndarray, targets: np.ndarray, precision: float) -> float | None:
    """
    Confidence below which cells should stay unassigned, for a wanted precision; None: nothing to choose it on.

    Parameters
    ----------
    probabilities
        Of validation cells, after the temperature, [cells, classes].
    targets
        Their classes, [cells].
    precision
        Wanted share of right labels among the assigned.

    Returns
    -------
    float or None
        At least 0.5. None with fewer than 50 cells, or where no threshold reaches the precision.

    Examples
    --------
    >>> sure, unsure = [[0.9, 0.1]] * 60, [[0.7, 0.3]] * 20
    >>> round(threshold_of(np.array(sure + unsure), np.array([0] * 60 + [1] * 20), 0.95), 2)
    0.8
    """
    if len(targets) < MIN_CELLS_FOR_TEMPERATURE:
        return None
    chosen = choose_threshold(probabilities, targets, precision, default=DEFAULT_THRESHOLD)
    return max(DEFAULT_THRESHOLD, chosen.threshold) if chosen.reached else None


def _confidence_scores(logits: np.ndarray, targets: np.ndarray, config: Any) -> dict[str, Any]:
    temperature, threshold = config.classifier_temperature, config.unassigned_threshold
    probabilities = softmax(logits, temperature)
    assigned = probabilities.max(axis=1) >= (DEFAULT_THRESHOLD if threshold is None else threshold)
    right = probabilities.argmax(axis=1) == targets
    result: dict[str, Any] = {
        "assigned": {
            "share": float(assigned.mean()),
            "accuracy": float(right[assigned].mean()) if assigned.any() else None,
        }
    }
    if find_spec("torchmetrics") is not None:
        result["calibration"] = {
            "before": calibration_metrics(logits, targets),
            "after": calibration_metrics(logits, targets, temperature),
        }
    return result


def temperature_of(logits: np.ndarray, targets: np.ndarray) -> float:
    """
    What to divide logits by for honest confidences; 1 where the validation cells are too few or too easy to tell.

    Parameters
    ----------
    logits
        Of validation cells, [cells, classes].
    targets
        Their classes, [cells].

    Examples
    --------
    >>> temperature_of(np.array([[4.0, 0.0]] * 80), np.array([0] * 60 + [1] * 20)) > 3
    True
    """
    if len(targets) < MIN_CELLS_FOR_TEMPERATURE:
        return 1.0
    low, high = TEMPERATURES
    temperature = fit_temperature(logits, targets, TEMPERATURES)
    return temperature if low * 1.01 < temperature < high / 1.01 else 1.0


def _scores(targets: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict[str, Any]:
    names = np.array(classes, dtype=object)
    scores = classification_metrics(names[targets], names[predicted])
    return {"cells": len(targets), **scores}


def score_baseline(data: FinetuneData, layer: str | None, seed: int) -> dict[str, Any]:
    """
    Logistic regression on log1p CP10k of the same training cells, scored on the same splits.

    Parameters
    ----------
    data
        Splits and their sources.
    layer
        Layer that holds the values.
    seed
        Of folds, and of the part of the training cells that is taken where there are very many.

    Returns
    -------
    dict
        ``name``, ``C``, ``seconds``, ``notes`` and scores by split.
    """
    start = time.perf_counter()
    baseline = LogisticRegressionBaseline(penalty="l2", grid=BASELINE_GRID, seed=seed, threads=1)
    train, notes = _slice(data, "train"), []
    if train.n_obs > MAX_BASELINE_CELLS:
        chosen = np.random.default_rng(seed).choice(train.n_obs, MAX_BASELINE_CELLS, replace=False)
        train, notes = (
            train[np.sort(chosen)].copy(),
            [f"learnt from {MAX_BASELINE_CELLS} of the training cells"],
        )
    baseline.fit(train, _LABEL, layer, data.input_kind)
    result: dict[str, Any] = {"name": "logistic regression (L2, log1p CP10k)", "C": baseline.C}
    for name in ("validation", "test"):
        part = data.splits[name]
        if len(part):
            predicted = baseline.predict(_slice(data, name), layer, data.input_kind)
            result[name] = {
                "cells": len(part),
                **classification_metrics(np.array(data.classes, dtype=object)[part.targets], predicted),
            }
    return result | {"seconds": time.perf_counter() - start, "notes": notes + baseline.notes}


_LABEL = "scbert_label"


def _slice(data: FinetuneData, split: str) -> Any:
    """Cells of a split as an AnnData with their cleaned labels."""
    part = data.splits[split]
    cells = data.sources[split][part.cells].copy()
    cells.obs[_LABEL] = np.array(data.classes, dtype=object)[part.targets]
    return cells


def summarise(
    settings: dict[str, Any],
    data: FinetuneData,
    tuned: TunedModel,
    training: TrainingArguments,
    scores: dict[str, Any],
    baseline: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """
    Everything a reader of the model has to know, as plain JSON.

    The figures that count stand at the top level: ``test_accuracy``, ``test_macro_f1`` and the baseline's.
    """
    parameters, config, state = list(tuned.model.parameters()), tuned.model.config, tuned.state
    history = _history(state.log_history)
    best = max((row for row in history if "macro_f1" in row), key=lambda row: row["macro_f1"], default={})
    head = {}
    for name in ("test", "validation"):
        for metric in ("accuracy", "macro_f1"):
            if name in scores:
                head[f"{name}_{metric}"] = scores[name][metric]
            if name in baseline:
                head[f"baseline_{name}_{metric}"] = baseline[name][metric]
    notes = list(baseline.get("notes", []))
    if head.get("baseline_test_macro_f1", 0) > head.get("test_macro_f1", 1):
        notes.append("the baseline, logistic regression, has the higher macro-F1 on the test cells")
    return {
        **head,
        "cells": data.report["cells"],
        "classes": data.classes,
        "data": data.report,
        "model": {
            "parameters": sum(p.numel() for p in parameters),
            "temperature": config.classifier_temperature,
            "unassigned_threshold": config.unassigned_threshold,
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "training": {
            "epochs": state.epoch,
            "best_epoch": best.get("epoch"),
            "steps": state.global_step,
            "processes": training.world_size,
            "device": str(training.device),
            "history": history,
        },
        **scores,
        "baseline": baseline,
        "seconds": seconds,
        "settings": settings,
        "versions": versions(),
        "notes": notes,
    }


def _history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row per logged epoch: loss of training and validation, validation scores."""
    rows: dict[float, dict[str, float]] = {}
    names = {"loss": "train_loss", "eval_loss": "validation_loss", "eval_macro_f1": "macro_f1"}
    names["eval_accuracy"] = "accuracy"
    for entry in log:
        found = {names[name]: value for name, value in entry.items() if name in names}
        if found:
            rows.setdefault(entry["epoch"], {"epoch": entry["epoch"]}).update(found)
    return [rows[epoch] for epoch in sorted(rows)]


def draw_figures(folder: Path, summary: dict[str, Any]) -> None:
    """Write confusion.png and learning_curve.png."""
    split = "test" if "test" in summary else "validation"
    scores = summary[split]
    title = f"{split}: accuracy {scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f}"
    plot_confusion(scores["confusion"], folder / "confusion.png", title)
    plot_learning_curve(summary["training"]["history"], folder / "learning_curve.png")


def plot_learning_curve(history: list[dict[str, float]], path: Path) -> None:
    """
    Loss of training and validation on the left, validation scores on the right, by epoch.

    Parameters
    ----------
    history
        Rows with ``epoch`` and any of ``train_loss``, ``validation_loss``, ``accuracy``, ``macro_f1``.
    path
        Picture to write.
    """
    figure = require("matplotlib.figure").Figure(figsize=(8, 3.2), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    lines = {
        losses: (("train_loss", "training", "#4477aa"), ("validation_loss", "validation", "#cc6677")),
        scores: (("accuracy", "accuracy", "#4477aa"), ("macro_f1", "macro-F1", "#cc6677")),
    }
    for axes, wanted in lines.items():
        for name, label, colour in wanted:
            points = [(row["epoch"], row[name]) for row in history if name in row]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=label,
                    color=colour,
                    marker="." if len(points) < 30 else None,
                )
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    best = max((row for row in history if "macro_f1" in row), key=lambda row: row["macro_f1"], default=None)
    if best:
        for axes in (losses, scores):
            axes.axvline(best["epoch"], color="#999999", linestyle=":", linewidth=1)
    losses.set_title("cross-entropy", fontsize=10)
    scores.set_title("validation (dotted: epoch kept)", fontsize=10)
    figure.savefig(path, dpi=130)
