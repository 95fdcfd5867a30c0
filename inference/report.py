"""The report of an annotation: what `scbert annotate --report` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.paths import atomic_path
from ..data.read_backed import BackedCells
from ..evaluation.embedding_plot import plot_embedding, umap_of
from ..evaluation.metrics import shortened
from ..evaluation.report import Section, report_html
from ..evaluation.tables import TextTable
from ..extras import require
from .expression_pca import expression_pca
from .voting import MIXED_SHARE

# more cells make a UMAP slow and no clearer
MAX_CELLS_DRAWN = 5000
MAX_GROUPS_DRAWN = 60


def write_annotation_report(
    path: str | Path,
    adata: AnnData | BackedCells,
    parts: dict[str, Any],
    summary: dict[str, Any],
    places: tuple,
    overwrite: bool = False,
) -> None:
    """
    Write one HTML file: cells per type, gene overlap, confidence by type and by cluster, a UMAP.

    `parts` and `summary` are the annotation of the query, `places` what `cell_coordinates` says of it.
    """
    obs, about = parts["obs"], parts["uns"]["scbert"]
    labels, confidence = np.asarray(obs["scbert_cell_type"], dtype=object), obs["scbert_confidence"]
    pictures = {
        "Confidence of the cells of every type; the line is the threshold.": plot_confidence(
            labels, confidence, about["threshold"]
        ),
        "Genes of the model found in the query.": plot_overlap(summary["gene_overlap"]),
    }
    tables = [types_table(labels, confidence)]
    if "majority_vote" in about:
        tables.append(_groups(about["majority_vote"]))
        groups = obs["scbert_leiden"] if "scbert_leiden" in obs else adata.obs[about["majority_vote"]["key"]]
        groups = np.asarray(groups).astype(object).astype(str)
        if len(set(groups)) <= MAX_GROUPS_DRAWN:
            caption = "Confidence of the cells of every group; the line is the threshold."
            pictures[caption] = plot_confidence(groups, confidence, about["threshold"])
    xy, chosen, source = places
    if xy is not None:
        panels = {"cell type": labels[chosen]}
        if "scbert_majority_vote" in obs:
            panels["majority vote"] = np.asarray(obs["scbert_majority_vote"]).astype(str)[chosen]
        pictures[f"Cells by predicted type: {source}."] = plot_embedding(xy, panels)
    if "prediction_sets" in summary:
        tables.append(_set_sizes(summary["prediction_sets"]))
    facts = {
        "model": summary["model"],
        "cells": f"{summary['cells']:,}",
        "unassigned": f"{summary['unassigned']:,} (confidence below {about['threshold']:.3g})",
        "genes found": f"{summary['genes_found']:,} of {summary['genes_of_model']:,}",
        **{f"version of {name}": version for name, version in about["versions"].items()},
    }
    sections = [
        Section("Cell types", warnings=summary["notes"], tables=tables),
        Section("Pictures", pictures=pictures),
        Section("How it was made", facts=facts),
    ]
    with atomic_path(path, overwrite) as temporary:
        temporary.write_text(report_html("scBERT: annotation", sections), encoding="utf-8")


def plot_confidence(labels: np.ndarray, confidence: np.ndarray, threshold: float) -> Any:
    """Box plots of the confidence, a row per label, the commonest on top."""
    names = list(pd.Series(labels).value_counts().index)
    figure = require("matplotlib.figure").Figure(figsize=(5.2, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    values = [confidence[labels == name] for name in names]
    shown = [shortened(str(name), 28) for name in names]
    axes.boxplot(
        values, orientation="horizontal", tick_labels=shown, flierprops={"markersize": 2}, widths=0.6
    )
    axes.axvline(threshold, color="#cc6677", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1.01), xlabel="confidence (largest probability)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_overlap(overlap: dict[str, Any]) -> Any:
    """One bar of the model's genes: found and absent, and the query's that it does not use."""
    figure = require("matplotlib.figure").Figure(figsize=(5.2, 1.9), layout="constrained")
    axes = figure.subplots()
    axes.barh(["model"], [overlap["matched"]], color="#44aa99", label="in both")
    axes.barh(["model"], [overlap["absent"]], left=[overlap["matched"]], color="#dddddd", label="absent")
    axes.barh(["query"], [overlap["matched"]], color="#44aa99")
    axes.barh(["query"], [overlap["unused"]], left=[overlap["matched"]], color="#88ccee", label="not used")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    axes.invert_yaxis()
    axes.set_xlabel("genes")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def types_table(labels: np.ndarray, confidence: np.ndarray) -> TextTable:
    """Cells, share and confidence of every type, the commonest first."""
    rows = []
    for name, count in pd.Series(labels).value_counts().items():
        values = confidence[labels == name]
        middle = [f"{values.mean():.3f}", f"{np.median(values):.3f}"]
        rows.append([name, f"{count:,}", f"{count / len(labels):.1%}", *middle])
    columns = ["cell type", "cells", "share", "mean confidence", "median"]
    return TextTable(f"{len(labels):,} cells", columns, rows)


def _set_sizes(sets: dict[str, Any]) -> TextTable:
    """Cells by the size of their prediction set."""
    counts = sets["cells_per_size"]
    cells = sum(counts.values())
    rows = [[size, f"{count:,}", f"{count / cells:.1%}"] for size, count in counts.items()]
    title = f"Prediction sets at coverage {sets['coverage']:g}: {sets['mean_size']:.2f} types in the mean"
    return TextTable(title, ["types in the set", "cells", "share"], rows)


def _groups(vote: dict[str, Any]) -> TextTable:
    """Every group's vote; those with a winner of less than 60% are marked."""
    rows = [
        [str(group), str(label), f"{cells:,}", f"{share:.0%}", f"{sure:.3f}", str(second)]
        for group, label, cells, share, sure, second in zip(
            *(vote[name] for name in ("group", "label", "cells", "share", "confidence", "runner_up"))
        )
    ]
    mixed = frozenset(i for i, share in enumerate(vote["share"]) if share < MIXED_SHARE)
    columns = ["group", "majority vote", "cells", "winning share", "confidence", "second"]
    return TextTable(f"Groups of {vote['key']}", columns, rows, mixed)


def cell_coordinates(adata: AnnData | BackedCells, layer: str | None = None, input: str = "auto"):
    """
    Places of the cells drawn, which they are, and what the places are; None where scanpy is not installed.

    Always of the expression: a picture of the model's probabilities makes any classifier look clean.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:MAX_CELLS_DRAWN])
    if "X_umap" in adata.obsm:
        xy = np.asarray(adata.obsm["X_umap"])[chosen, :2]
        # of files that were brought together, some cells may have no place
        if np.isfinite(xy).all():
            return xy, chosen, "the query's own UMAP"
    try:
        components = expression_pca(adata, layer, input, chosen)
    except ImportError:
        return None, chosen, ""
    return umap_of(components), chosen, "UMAP of the expression"
