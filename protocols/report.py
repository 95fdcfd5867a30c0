"""The report of a benchmark: what `scbert evaluate --report` writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.paths import atomic_path
from ..evaluation.embedding_plot import plot_embedding, umap_of
from ..evaluation.report import Section, report_html
from ..evaluation.tables import TextTable
from .folds import Fold
from .methods import Outputs

CAPTIONS = {
    "scores.png": "Macro-F1 of every fold; baselines are grey.",
    "confusion.png": "Confusion of the model in question, folds pooled: rows are true types.",
    "reliability.png": "Reliability: accuracy against confidence.",
}


def write_report(
    path: str | Path,
    folder: Path,
    protocol: str,
    tables: Sequence[TextTable],
    main: Sequence[tuple[Fold, Outputs, np.ndarray]],
    result: dict[str, Any],
    overwrite: bool = False,
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
        "protocol": protocol,
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
    with atomic_path(path, overwrite) as temporary:
        Path(temporary).write_text(report_html(f"scBERT: {protocol}", sections), encoding="utf-8")
