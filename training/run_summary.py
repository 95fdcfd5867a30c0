"""Figures of a fine-tuning run: scores beside logistic regression, the summary, in words and in pictures."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..data.labels import UNASSIGNED
from ..data.read import log_normalize
from ..evaluation.calibration import expected_calibration_error, softmax
from ..evaluation.metrics import classification_metrics, plot_confusion
from ..tokenization import align_genes
from ..trained_model.model_folder import versions
from .averaging import some_cells
from .finetune_data import FinetuneData, LabelledCells
from .logistic_head import cross_folds, solve_head
from .solved_head import HeldOut

logger = logging.getLogger(__name__)

# the baseline is a yardstick, not the job: past this many cells it learns from a random part, with so many of each type
MAX_BASELINE_CELLS, BASELINE_CELLS_A_TYPE = 4000, 20
# what a test score is of, by the name that its figures have
ESTIMATES = {
    "test": "cells that were not learnt from",
    "cross_validation": "all labelled cells, each by fits on four fifths of the others",
    "validation": "cells that chose the best epoch: not a test",
}
# scBERT's threshold of "unassigned"; one chosen for a precision is never lower
DEFAULT_THRESHOLD = 0.5
# a lead of logistic regression that is no accident of a few cells
LEAD = 0.005
# below this share of assigned cells, the model says little
FEW_ASSIGNED = 0.5
ESTIMATE_WORDS = {
    "cross_validation": "Cross-validation",
    "test": "On the test cells",
    "validation": "On the validation cells (which chose the best epoch: not a test)",
}


@dataclass
class TunedModel:
    """
    A model as fine-tuning left it, by whatever way, with its best weights: what is scored and summarised.

    The state has steps and history, and is empty where nothing was trained in steps. Calibrated probabilities of some
    cells are [cells, classes]. On several processes all of them must ask for these, and for the weights by name: under
    FSDP each holds a part. Where the head was solved for, cross-fitting says of the training cells what is `held_out`.
    """

    model: PreTrainedModel
    state: TrainerState
    probabilities_of: Callable[[LabelledCells], np.ndarray]
    weights: Callable[[], dict[str, torch.Tensor]]
    held_out: HeldOut | None = None


def score_splits(tuned: TunedModel, data: FinetuneData) -> dict[str, dict[str, Any]]:
    """
    Scores by estimate (see `ESTIMATES`), with calibration and what the threshold of "unassigned" does.

    A split without cells is left out. On several processes all of them must call this.
    """
    scores, threshold = {}, tuned.model.config.unassigned_threshold
    if tuned.held_out is not None:
        learnt = data.splits["train"]
        judged = judged_cells(learnt.targets)
        if judged.any():
            asked = tuned.held_out.probabilities[judged], learnt.targets[judged]
            right = asked[0].argmax(axis=1) == asked[1]
            intervals = fold_intervals(right, tuned.held_out.folds[judged])
            scores["cross_validation"] = _scores(*asked, data, threshold) | intervals
    for name in ("validation", "test"):
        part = data.splits[name]
        if len(part):
            scores[name] = _scores(tuned.probabilities_of(part), part.targets, data, threshold)
    return scores


def judged_cells(targets: np.ndarray) -> np.ndarray:
    """Cells whose class has another cell to learn it from, bool [cells]: of the others cross-fitting says nothing."""
    return np.bincount(targets)[targets] > 1


def fold_intervals(right: np.ndarray, folds: np.ndarray) -> dict[str, Any]:
    """
    95% interval of the accuracy over folds, by Student's t.

    Examples
    --------
    >>> found = fold_intervals(np.array([True, True, True, False]), np.array([0, 0, 1, 1]))
    >>> found["accuracy_of_folds"]
    [1.0, 0.5]
    """
    of_folds = [float(right[folds == fold].mean()) for fold in np.unique(folds)]
    found, n_folds = {"accuracy_of_folds": of_folds}, len(of_folds)
    if n_folds > 1:
        half = float(student_t.ppf(0.975, n_folds - 1) * np.std(of_folds, ddof=1) / n_folds**0.5)
        found["accuracy_interval"] = np.clip(np.mean(of_folds) + np.array([-half, half]), 0, 1).tolist()
    return found


def _scores(
    probabilities: np.ndarray, targets: np.ndarray, data: FinetuneData, threshold: float | None = None
) -> dict[str, Any]:
    names, confidence = np.array([*data.classes, UNASSIGNED], dtype=object), probabilities.max(axis=1)
    # a cell without expression has no type, and not the first
    best = np.where(confidence > 0, probabilities.argmax(axis=1), -1)
    right = best == targets
    assigned = confidence >= (DEFAULT_THRESHOLD if threshold is None else threshold)
    return {
        "cells": len(targets),
        **classification_metrics(names[targets], names[best]),
        "assigned": {
            "share": float(assigned.mean()),
            "accuracy": float(right[assigned].mean()) if assigned.any() else None,
        },
        "mean_confidence": float(confidence.mean()),
        "ece": expected_calibration_error(probabilities, targets),
    }


def score_baseline(data: FinetuneData, tuned: TunedModel, layer: str | None, seed: int) -> dict[str, Any]:
    """
    Logistic regression on log1p CP10k of the same cells, its strength chosen by the same cross-fitting.

    Of very many cells it learns from some (`some_cells`) and is judged by all, in cross-validation by fits that knew
    nothing of them. Gives ``name``, ``seconds``, ``notes``, and scores for the estimate that counts.
    """
    start, notes = time.perf_counter(), []
    asked = next((name for name in ("test", "validation") if len(data.splits[name])), None)
    learnt = [data.splits[name] for name in ("train", "validation") if name != asked]
    cells, targets = (np.concatenate([getattr(part, of) for part in learnt]) for of in ("cells", "targets"))
    taught = some_cells(targets, targets >= 0, MAX_BASELINE_CELLS, BASELINE_CELLS_A_TYPE)
    if not taught.all():
        notes.append(f"the baseline learnt from {taught.sum():,} of the {len(cells):,} cells")
    values, genes = log_normalize(data.sources["train"], layer, data.input_kinds["train"])
    folds = cross_folds(targets, seed=seed) if tuned.held_out is None else tuned.held_out.folds
    head = solve_head(values[cells[taught]], targets[taught], len(data.classes), folds[taught], powers=(0.0,))
    result: dict[str, Any] = {"name": "logistic regression (L2, strength by cross-validation, log1p CP10k)"}
    if asked is None:
        judged = judged_cells(targets)
        if judged.any():
            # the cells that no fit learnt from are asked of the one on all others
            logits = values[cells] @ head.weights.T + head.bias
            logits[taught] = head.logits
            result["cross_validation"] = _scores(softmax(logits[judged]), targets[judged], data)
    else:
        part = data.splits[asked]
        others, names = log_normalize(data.sources[asked], layer, data.input_kinds[asked], genes)
        rows = align_genes(names, genes).apply(others)[part.cells]
        result[asked] = _scores(softmax(rows @ head.weights.T + head.bias), part.targets, data)
    return result | {"seconds": time.perf_counter() - start, "notes": notes}


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

    The figures that count stand at the top level, by the name of their estimate: ``cross_validation_accuracy`` or
    ``test_accuracy``, the macro-F1, and the baseline's.
    """
    config, state = tuned.model.config, tuned.state
    history = _history(state.log_history)
    kept = state.best_global_step if training.load_best_model_at_end else state.global_step
    estimate = next((name for name in ESTIMATES if name in scores), None)
    head: dict[str, Any] = {"estimate": estimate, "estimate_of": ESTIMATES.get(estimate)}
    for name in scores:
        for metric in ("accuracy", "macro_f1"):
            head[f"{name}_{metric}"] = scores[name][metric]
            if name in baseline:
                head[f"baseline_{name}_{metric}"] = baseline[name][metric]
    notes = [*data.report.get("notes", ()), *baseline.get("notes", ())]
    if estimate is None:
        notes.append("every class has a single cell: how good the model is cannot be said")
    elif head.get(f"baseline_{estimate}_macro_f1", 0) > head[f"{estimate}_macro_f1"]:
        notes.append("the baseline, logistic regression, has the higher macro-F1 on the same cells")
    return {
        **head,
        "cells": data.report["cells"],
        "classes": data.classes,
        "data": data.report,
        "model": {
            "parameters": tuned.model.num_parameters(),
            "unassigned_threshold": config.unassigned_threshold,
            "trained": tuned.model.num_parameters(only_trainable=True),
        },
        "solved_head": None if tuned.held_out is None else tuned.held_out.report,
        "training": {
            "epochs": state.epoch,
            "best_epoch": next((row["epoch"] for row in state.log_history if row["step"] == kept), None),
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


def log_summary(summary: dict[str, Any], output: str | Path) -> None:
    """Log what was learnt, how good it is beside logistic regression, and what to do next."""
    logger.info(_say_learnt(summary))
    taught = (summary["solved_head"] or {}).get("unlabelled")
    if taught is not None:
        logger.info(_say_unlabelled(taught))
    estimate = summary["estimate"]
    if estimate is None:
        logger.warning("Every type has a single cell: how good the model is cannot be said.")
    else:
        logger.info(_say_scores(summary, estimate))
        logger.info(_say_assigned(summary, estimate))
        for warning in warnings(summary, estimate):
            logger.warning(warning)
    logger.info("Next: scbert annotate QUERY.h5ad --model %s --output annotated.h5ad", output)


def _say_learnt(summary: dict[str, Any]) -> str:
    cells, report = summary["cells"], summary["data"]
    n_cells = cells["train"] + cells["validation"]
    seconds = sum(summary["seconds"].values()) + summary["baseline"].get("seconds", 0)
    left_out = {
        "without a label": report["unlabelled"],
        "without a gene of the panel": report["empty"],
        "with too few genes": report["min_genes"]["left_out"],
    }
    more = ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n)
    return (
        f"Learnt {len(summary['classes'])} types from {n_cells:,} cells and {report['genes']['panel']:,} genes in "
        f"{seconds:.0f} s" + (f" (left out: {more})." if more else ".")
    )


def _say_unlabelled(taught: dict[str, Any]) -> str:
    others = f"{taught['cells']:,} cells without labels"
    if not taught["kept"]:
        why = "held-out labelled cells were worse off with it, by more than a standard error"
        if taught["gain"] is None:
            why = f"ways to use them agree on {taught['agreement']:.0%} only, and no type has a second cell to judge by"
        return f"What {others} taught was left out: {why}."
    text = f"Learnt from {others} as well"
    if taught["gain"] is None:
        text += "; with one cell a type, whether that helps cannot be measured here"
    else:
        sure = taught["gain"] > 2 * taught["error"]
        text += f": on held-out labelled cells that {'is better' if sure else 'makes no clear difference'}"
    if taught["neighbours"] == "own":
        text += (
            f". The two kinds of cells can be told apart (AUC {taught['told_apart']:.2f}: another protocol or other "
            "types), so each was averaged with its own kind only: look at the result with care"
        )
    return f"{text}."


def _say_scores(summary: dict[str, Any], estimate: str) -> str:
    def told(accuracy: float, macro_f1: float) -> str:
        return f"{accuracy:.1%} right (macro-F1 {macro_f1:.3f})"

    ours = told(summary[f"{estimate}_accuracy"], summary[f"{estimate}_macro_f1"])
    text = f"{ESTIMATE_WORDS[estimate]}, {summary[estimate]['cells']:,} cells: {ours}"
    if f"baseline_{estimate}_accuracy" in summary:
        theirs = told(summary[f"baseline_{estimate}_accuracy"], summary[f"baseline_{estimate}_macro_f1"])
        text += f"; logistic regression on the same cells: {theirs}"
        text += "".join(f" ({note})" for note in summary["baseline"]["notes"])
    return text + "."


def _say_assigned(summary: dict[str, Any], estimate: str) -> str:
    assigned = summary[estimate]["assigned"]
    text = f"{assigned['share']:.1%} of the cells would be assigned a type"
    if assigned["accuracy"] is not None:
        text += f", {assigned['accuracy']:.1%} of these the right one"
    return f"{text}; the others come out unassigned."


def warnings(summary: dict[str, Any], estimate: str) -> list[str]:
    """What a reader must not overlook."""
    found, small = [], summary["data"]["small_classes"]
    lead = summary.get(f"baseline_{estimate}_macro_f1", 0) - summary[f"{estimate}_macro_f1"]
    if lead > LEAD:
        found.append(f"Logistic regression does better on these cells, by {lead:.3f} of macro-F1.")
    if summary[estimate]["assigned"]["share"] < FEW_ASSIGNED:
        found.append(
            "Most held-out cells would come out unassigned: the types are hard to tell apart, or have few cells. "
            "annotate takes a lower threshold (--threshold)."
        )
    if small:
        names = ", ".join(f"{name} ({n})" for name, n in list(small.items())[:10])
        found.append(f"Types of one or two cells, of which little is learnt and nothing measured: {names}.")
    return found


def draw_figures(folder: Path, summary: dict[str, Any]) -> None:
    """Write confusion.png, and learning_curve.png where there were epochs."""
    estimate = summary["estimate"]
    if estimate is not None:
        scores, words = summary[estimate], estimate.replace("_", "-")
        title = f"{words}: accuracy {scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f}"
        plot_confusion(scores["confusion"], folder / "confusion.png", title)
    training = summary["training"]
    if training["history"]:
        plot_learning_curve(training["history"], training["best_epoch"], folder / "learning_curve.png")


def plot_learning_curve(history: list[dict[str, float]], kept: float | None, path: Path) -> None:
    """Loss of training and validation, and validation scores, by epoch; a line at the one whose weights are kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    lines = {
        losses: (("train_loss", "training", "#4477aa"), ("validation_loss", "validation", "#cc6677")),
        scores: (("accuracy", "accuracy", "#4477aa"), ("macro_f1", "macro-F1", "#cc6677")),
    }
    for axes, wanted in lines.items():
        for name, label, colour in wanted:
            points = [(row["epoch"], row[name]) for row in history if name in row]
            if points:
                marker = "." if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        if kept is not None:
            axes.axvline(kept, color="#999999", linestyle=":", linewidth=1)
    losses.set_title("cross-entropy", fontsize=10)
    scores.set_title("validation (dotted: epoch kept)", fontsize=10)
    figure.savefig(path, dpi=130)
