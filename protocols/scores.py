"""Scores of one method on one fold."""

import math
from typing import Any

import numpy as np

from ..evaluation.calibration import expected_calibration_error
from ..evaluation.metrics import classification_metrics
from ..evaluation.novelty import (
    energy_score,
    entropy_score,
    mahalanobis_score,
    max_probability_score,
    neighbour_score,
    novel_type_metrics,
    novelty_auroc,
    reject,
)
from ..training.run_summary import DEFAULT_THRESHOLD
from .folds import Fold
from .methods import Method, Outputs


def fold_scores(method: Method, outputs: Outputs, fold: Fold, true: np.ndarray) -> dict[str, Any]:
    """
    One row of results: what a method said of a fold's test cells, whose types are `true`.

    Scores are over the test cells whose type was learnt; those of a novel type (`novelty_scores`) over all.
    """
    known = np.isin(true, outputs.classes)
    scores = classification_metrics(true[known], outputs.predicted[known])
    targets = np.array([outputs.classes.index(label) for label in true[known]])
    row = {
        "fold": fold.name,
        "setting": fold.setting,
        "model": method.name,
        "baseline": method.is_baseline,
        "cells": {"train": int((fold.split == "train").sum()), "test": len(true)},
        **{name: scores[name] for name in ("accuracy", "macro_f1", "balanced_accuracy")},
        "per_class": scores["per_class"],
        "confusion": scores["confusion"],
        "ece": expected_calibration_error(outputs.probabilities[known], targets),
        "seconds": outputs.seconds,
        "notes": outputs.notes,
    }
    if outputs.logits is not None:
        row["threshold"] = outputs.threshold
    if fold.novel is not None:
        row |= novelty_scores(outputs, true)
    return row


def novelty_scores(outputs: Outputs, true: np.ndarray) -> dict[str, Any]:
    """
    Known and novel accuracy by the rule "confidence below 0.5", and AUROC of every novelty score there is.

    ``at_fitted_threshold`` holds the accuracies at the threshold that the model has.
    """
    is_novel = ~np.isin(true, outputs.classes)
    certainty = max_probability_score(outputs.probabilities)
    called = reject(outputs.predicted, certainty, 1 - DEFAULT_THRESHOLD)
    row: dict[str, Any] = novel_type_metrics(true, called, outputs.classes)
    found = {"max_probability": certainty, "entropy": entropy_score(outputs.probabilities)}
    if outputs.logits is not None:
        fitted = reject(outputs.predicted, certainty, 1 - outputs.threshold)
        row["at_fitted_threshold"] = novel_type_metrics(true, fitted, outputs.classes)
        found["energy"] = energy_score(outputs.logits)
        train, embeddings = outputs.train_embeddings, outputs.embeddings
        found["mahalanobis"] = mahalanobis_score(train, outputs.train_labels, embeddings)
        found["neighbours"] = neighbour_score(train, embeddings)
    return row | {f"auroc_{name}": novelty_auroc(score, is_novel) for name, score in found.items()}


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
