"""The main job on real cells that ship with scanpy: fine-tune, annotate held-out cells, show the scores.

Then the annotator that ships with the package names the same held-out cells, of which it knows 765 genes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from rich.console import Console

from ..data.splits import stratified_split
from ..data.write_h5ad import atomic_write_h5ad
from ..evaluation.embedding_plot import plot_embedding
from ..evaluation.metrics import classification_metrics, plot_confusion
from ..evaluation.tables import TextTable
from ..tokenization import InputError
from ..training.run_finetune import finetune
from .annotate_cells import annotate
from .upload import LABEL_KEY, sample_cells

SPLIT_SEED = 0


def run_demo(output: str | Path = "demo") -> dict[str, Any]:
    """
    Fine-tune the default model on 560 real PBMCs, and annotate 140 held-out ones; scores and times come back.

    The cells are `scanpy.datasets.pbmc68k_reduced()`: 765 genes, 10 types given by sorted reference profiles. The
    `output` is a folder for ``model/``, ``annotated.h5ad``, ``umap.png`` and ``confusion.png``; what an earlier demo
    left there is replaced.
    """
    started = time.perf_counter()
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"{folder} is a file; the demo needs a folder. Give another name (output, --output)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    cells = demo_cells()
    atomic_write_h5ad(cells, folder / "cells.h5ad", overwrite=True)
    options = {"input": "log1p", "test_key": "split", "overwrite": True}
    run = finetune(folder / "cells.h5ad", LABEL_KEY, folder / "model", **options)
    held_out = cells[cells.obs["split"] == "test"].copy()
    annotated = annotate(held_out, model=folder / "model", input="log1p", progress=False)
    atomic_write_h5ad(annotated, folder / "annotated.h5ad", overwrite=True)
    # the likeliest type of every cell, whatever its confidence: the baseline has no threshold
    names = np.asarray(annotated.uns["scbert"]["labels"])
    predicted = names[annotated.obsm["scbert_probabilities"].argmax(axis=1)]
    scores = classification_metrics(annotated.obs[LABEL_KEY], predicted)
    draw(folder, cells, annotated, predicted, scores)
    summary = {
        "cells": held_out.n_obs,
        "accuracy": scores["accuracy"],
        "macro_f1": scores["macro_f1"],
        "baseline_accuracy": run["baseline_test_accuracy"],
        "baseline_macro_f1": run["baseline_test_macro_f1"],
        "unassigned": int((annotated.obs["scbert_cell_type"] == "unassigned").sum()),
        "threshold": float(annotated.uns["scbert"]["threshold"]),
        "seconds": time.perf_counter() - started,
        "output": str(folder),
    }
    show(summary)
    return summary


def demo_cells() -> AnnData:
    """The 700 cells of `sample_cells`, with the held-out ones in ``obs["split"]``."""
    cells = sample_cells()
    _, classes = np.unique(cells.obs[LABEL_KEY].astype(str), return_inverse=True)
    cells.obs["split"] = stratified_split(classes, 0.2, 0.0, seed=SPLIT_SEED).astype(str)
    return cells


def draw(
    folder: Path, cells: AnnData, annotated: AnnData, predicted: np.ndarray, scores: dict[str, Any]
) -> None:
    """Write umap.png and confusion.png."""
    right = f"{scores['accuracy']:.0%} right"
    plot_embedding(
        annotated.obsm["X_umap"],
        {"reference type": annotated.obs[LABEL_KEY], f"scBERT's annotation ({right})": predicted},
        folder / "umap.png",
        background=cells.obsm["X_umap"][cells.obs["split"] != "test"],
        title=f"{annotated.n_obs} held-out PBMCs; in grey the cells learnt from",
    )
    title = f"held-out cells: accuracy {scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f}"
    plot_confusion(scores["confusion"], folder / "confusion.png", title)


def show(summary: dict[str, Any]) -> None:
    """Print the scores as a table, on stderr."""
    models = {"scBERT, the default recipe": "", "logistic regression, same cells": "baseline_"}
    rows = [
        [name, f"{summary[prefix + 'accuracy']:.3f}", f"{summary[prefix + 'macro_f1']:.3f}"]
        for name, prefix in models.items()
    ]
    title = f"{summary['cells']} held-out cells, 10 types"
    console = Console(stderr=True)
    console.print(TextTable(title, ["model", "accuracy", "macro-F1"], rows).rich())
    console.print(
        f"{summary['unassigned']} of the cells have a confidence below {summary['threshold']:.2f} (chosen by "
        "held-out cells) and are 'unassigned' in the file.\n"
        f"{summary['seconds']:.0f} s; see {summary['output']}/annotated.h5ad, umap.png and confusion.png.",
        soft_wrap=True,
    )
