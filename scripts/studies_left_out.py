"""How an annotator of many studies does on a study that it knows nothing of, beside plain regressions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np

import scbert
from annotator_parts import LABEL
from scbert.evaluation.baselines import LogisticRegressionBaseline
from scbert.evaluation.metrics import classification_metrics
from tissue_cells import joined

REGRESSIONS = {"logistic_l1": "l1", "logistic_l2": "l2"}


def left_out(
    studies: dict[str, anndata.AnnData],
    tested: dict[str, anndata.AnnData],
    folder: Path,
    costs: dict[str, float],
    cell_axes_without: Callable[[Sequence[str]], str | Path],
    reference_of: Callable[[list[anndata.AnnData]], anndata.AnnData] = joined,
) -> list[dict]:
    """
    Scores of each study by models of the others, and of studies that are only tested by models of all.

    What a reference is of some studies is the caller's to say, C of the regressions, and a pretrained model that does
    not know what the studies left out differ in from others (`study_effects.model_without`).
    """
    folder.mkdir(exist_ok=True)
    rows = []
    for name in [*studies, *([""] if tested else [])]:
        file = folder / f"without_{name}.json"
        if not file.exists():
            rest = reference_of([cells for other, cells in studies.items() if other != name])
            asked = {name: studies[name]} if name else tested
            found = scores(rest, asked, costs, cell_axes_without([name] if name else []))
            file.write_text(json.dumps(found, indent=1))
        rows += json.loads(file.read_text())
    return rows


def scores(
    reference: anndata.AnnData,
    asked: dict[str, anndata.AnnData],
    costs: dict[str, float],
    cell_axes: str | Path,
) -> list[dict[str, Any]]:
    """Of an annotator and of logistic regressions taught the same cells, for every study asked for."""
    known = set(reference.obs[LABEL])
    kept = {name: cells[cells.obs[LABEL].isin(known).to_numpy()].copy() for name, cells in asked.items()}
    kept = {name: cells for name, cells in kept.items() if cells.n_obs}
    if not kept:
        return []
    options = {"input": "counts", "device": "cpu", "disable_tqdm": True, "cell_axes": str(cell_axes)}
    model = scbert.finetune(reference, LABEL, **options)
    regressions = {
        name: LogisticRegressionBaseline(penalty, (costs[name],)).fit(reference, LABEL, input="counts")
        for name, penalty in REGRESSIONS.items()
    }
    rows = []
    for name, cells in kept.items():
        true = cells.obs[LABEL].to_numpy().astype(str)
        found = model.annotate(cells, input="counts", force=True, progress=False)
        types = np.array(model.labels)[found.obsm["scbert_probabilities"].argmax(axis=1)]
        sure = (found.obs["scbert_cell_type"] != "unassigned").to_numpy()
        predicted = {"scbert": types}
        predicted |= {other: fit.predict(cells, input="counts") for other, fit in regressions.items()}
        row = {
            "study": name,
            "cells": len(true),
            "types": sorted(set(true)),
            "genes": len(reference.var_names.intersection(cells.var_names)) / reference.n_vars,
            "assigned": float(sure.mean()),
            "assigned_accuracy": float((types == true)[sure].mean()) if sure.any() else None,
        }
        for other, named in predicted.items():
            all_scores = classification_metrics(true, named)
            row[other] = {score: all_scores[score] for score in ("accuracy", "macro_f1")}
        rows.append(row)
    return rows


def score_table(rows: list[dict[str, Any]], studies: dict[str, str]) -> list[str]:
    """Scores of studies, of which it is told what they are, as lines of markdown."""
    lines = [
        "| study | cells | types | of its genes | this recipe | L1 | L2 | assigned | of these right |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        models = " | ".join(
            f"{row[name]['accuracy']:.3f} ({row[name]['macro_f1']:.2f})" for name in ("scbert", *REGRESSIONS)
        )
        right = "" if row["assigned_accuracy"] is None else f"{row['assigned_accuracy']:.1%}"
        what = f"{row['study']} ({studies[row['study']]})"
        lines.append(
            f"| {what} | {row['cells']:,} | {len(row['types'])} | {row['genes']:.0%} | {models} | "
            f"{row['assigned']:.0%} | {right} |"
        )
    return lines


def mean_accuracy(rows: list[dict[str, Any]], name: str) -> float:
    """Of a model over studies, each as much as another."""
    return float(np.mean([row[name]["accuracy"] for row in rows]))
