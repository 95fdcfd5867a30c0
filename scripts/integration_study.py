"""
Batch effects: types kept together and batches mixed by an embedding, beside components of the same cells.

    python scripts/integration_study.py CELLS... --label-key KEY --group-key BATCH --base MODEL --output DIR
"""

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from integration_metrics import integration_metrics
from scbert.data.paths import partial_folder
from scbert.data.read import log_normalize
from scbert.evaluation.embedding_plot import plot_embedding, umap_of
from scbert.evaluation.tables import TextTable
from scbert.extras import require
from scbert.protocols.cells import LABEL, input_of
from scbert.protocols.folds import groups_of
from scbert.protocols.methods import write_ablation
from scbert.protocols.run import RESULTS
from scbert.protocols.scores import finite
from scbert.trained_model.model_folder import load_model, versions
from scbert.trained_model.prediction import predict_cells
from study_frame import run_study, study_parser

logger = logging.getLogger(__name__)

COMPONENTS, VARIABLE_GENES = 50, 2000
SCORES = {
    "nmi": "NMI",
    "ari": "ARI",
    "asw_label": "ASW label",
    "avg_bio": "AvgBIO",
    "asw_batch": "ASW batch",
    "graph_connectivity": "graph conn.",
    "avg_batch": "AvgBATCH",
}
BEFORE, AFTER, UNTRAINED = "log1p, PCA", "scBERT embedding", "untrained scBERT"


def run_batch_effect(
    cells: anndata.AnnData,
    output: str | Path,
    group_key: str,
    base: str | Path,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[dict[str, Any], list[TextTable]]:
    """
    AvgBIO and AvgBATCH of cells before (principal components) and after (a model's embedding).

    Parameters
    ----------
    cells
        Of `load_benchmark_cells`.
    output
        Folder for ``results.json``, ``table.md`` and a UMAP of every representation.
    group_key
        Column of the batches.
    base
        Model folder of any head. The same architecture with random weights is its baseline.
    seed
        Of components, neighbours, clusters and the untrained model.
    overwrite
        Replace an existing output.

    Returns
    -------
    tuple
        The result, as in ``results.json``, and its table.

    Raises
    ------
    InputError
        Without batches, or where the model does not fit the cells.
    """
    started = time.perf_counter()
    batches, labels = groups_of(cells, group_key), cells.obs[LABEL].astype(str).to_numpy()
    with partial_folder(output, overwrite, marker=RESULTS) as folder:
        embeddings = principal_components(cells, seed) | model_embeddings(cells, base, folder / "work", seed)
        rows = []
        for name, vectors in embeddings.items():
            rows.append({"representation": name, **integration_metrics(vectors, labels, batches, seed=seed)})
            logger.info("%s: AvgBIO %.3f, AvgBATCH %.3f", name, rows[-1]["avg_bio"], rows[-1]["avg_batch"])
            file = folder / f"umap_{'_'.join(name.replace(',', '').split())}.png"
            plot_embedding(
                umap_of(vectors, seed), {"type": labels, str(group_key): batches}, file, title=name
            )
        table = score_table(rows, group_key)
        result = {
            "protocol": "integration",
            "cells": cells.n_obs,
            "batches": {str(name): int(n) for name, n in zip(*np.unique(batches, return_counts=True))},
            "cells_per_type": {str(name): int(n) for name, n in zip(*np.unique(labels, return_counts=True))},
            "warnings": warnings_of_rows(rows),
            "rows": rows,
            "settings": {"base": str(base), "group_key": group_key, "seed": seed},
            "versions": versions(),
            "seconds": time.perf_counter() - started,
        }
        text = table.markdown() + "".join(f"\n\n⚠ {warning}" for warning in result["warnings"])
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
        written = json.dumps(finite(result), indent=1, ensure_ascii=False)
        (folder / RESULTS).write_text(written + "\n", encoding="utf-8")
    return {**result, "output": str(output)}, [table]


def principal_components(cells: anndata.AnnData, seed: int) -> dict[str, np.ndarray]:
    """50 components of the 2,000 most variable genes: of the values as they stand, and of log1p CP10k."""
    logged, _ = log_normalize(cells, input=input_of(cells))
    found = {"values as they stand, PCA": cells.X, BEFORE: logged}
    if input_of(cells) == "log1p":
        # the same matrix twice
        found.pop("values as they stand, PCA")
    decomposition, vectors = require("sklearn.decomposition"), {}
    for name, matrix in found.items():
        mean = np.asarray(matrix.mean(axis=0)).ravel()
        variance = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2
        chosen = np.sort(np.argsort(-variance, kind="stable")[:VARIABLE_GENES])
        dense = matrix[:, chosen].toarray()
        size = min(COMPONENTS, *(n - 1 for n in dense.shape))
        vectors[name] = decomposition.PCA(size, svd_solver="arpack", random_state=seed).fit_transform(dense)
    return vectors


def model_embeddings(
    cells: anndata.AnnData, base: str | Path, work: Path, seed: int
) -> dict[str, np.ndarray]:
    """Embeddings by the model, and by its architecture with random weights."""
    found = {}
    for name, folder in ((AFTER, base), (UNTRAINED, write_ablation(base, work, "nothing learnt", seed))):
        loaded = load_model(folder, "embedding", dtype="float32")
        loaded.tokenizer.align(cells).check()
        bins = loaded.tokenizer.bin_cells(cells, input=input_of(cells))
        found[name] = predict_cells(loaded, bins, ("embeddings",))["embeddings"]
    shutil.rmtree(work)
    return found


def score_table(rows: list[dict[str, Any]], group_key: str | None) -> TextTable:
    """All scores, the representations one below the other."""
    lines = [[row["representation"], *(_number(row[name]) for name in SCORES)] for row in rows]
    title = f"integration over {group_key} (1 is best; untrained: the same architecture, random weights)"
    return TextTable(title, ["representation", *SCORES.values()], lines)


def warnings_of_rows(rows: list[dict[str, Any]]) -> list[str]:
    """What the model's embedding loses against log-PCA or against its untrained self."""
    by_name = {row["representation"]: row for row in rows}
    model, found = by_name[AFTER], []
    for other in (BEFORE, UNTRAINED):
        for score in ("avg_bio", "avg_batch"):
            if by_name[other][score] > model[score] + 5e-4:
                found.append(
                    f"{other} beats the {AFTER}: {SCORES[score]} {by_name[other][score]:.3f} against "
                    f"{model[score]:.3f}."
                )
    return found


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python scripts/integration_study.py``; returns the exit code."""
    parser = study_parser(__doc__.strip().partition("\n")[0])
    parser.add_argument("--group-key", required=True, help="Column of the batches, such as dataset or donor.")
    parser.add_argument("--base", type=Path, required=True, help="Model whose embedding is judged.")
    return run_study(run_batch_effect, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
