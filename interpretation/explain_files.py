"""The job behind `scbert explain`: three explanations of a model's cell types, what is known, which to trust."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from rich.console import Console

from ..data.labels import find_labels
from ..data.paths import check_output_folder, partial_folder
from ..data.read import read_cells
from ..data.write_h5ad import atomic_write_h5ad
from ..evaluation.metrics import shortened
from ..evaluation.tables import TextTable
from ..inference.query import BinnedQuery
from ..inference.shipped import model_or_shipped
from ..tokenization import InputError, select_matrix
from ..trained_model.model_folder import load_model
from ..trained_model.prediction import LoadedModel, predict_cells
from ..training.settings import read_json
from .deletion import deletion_test, verdict
from .enrichment import enrich_by_type, read_gmt
from .explain_types import GRADIENTS, check_sizes, choose_cells, explanations, mean_by_type
from .markers import differential_expression_agreement, marker_overlap, read_marker_table, top_genes_table
from .plots import plot_summary, plot_top_genes

logger = logging.getLogger(__name__)

RESULTS = "explanation.json"
PREDICTED = "scbert_explained_type"


def explain_file(
    query: str | Path,
    model: str | Path | LoadedModel | None,
    output: str | Path,
    *,
    label_key: str | None = None,
    cells_per_type: int = 20,
    n_top: int = 20,
    n_steps: int = 32,
    markers: str | Path | None = None,
    marker_names: str | Path | None = None,
    gene_sets: str | Path | None = None,
    layer: str | None = None,
    input: str = "auto",
    force: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Say which genes a model looks at and which decide, for every cell type it predicts.

    Parameters
    ----------
    query, model, cells_per_type, n_steps, layer, input, force
        As in `scbert.explain`.
    output
        Folder for CSV tables, pictures, ``explanation.json`` and ``explained.h5ad``.
    label_key
        Column of obs with true types: differential expression is then taken between those, else between the
        predicted ones.
    n_top
        Genes of a type in the table; the deletion test removes as many.
    markers, marker_names
        Marker table (PanglaoDB, CellMarker, or columns cell_type and gene), and a JSON of the query's types ->
        name(s) in it.
    gene_sets
        A .gmt file for enrichment.
    seed
        Of the cells, GradientSHAP and the deletion test.
    overwrite
        Replace an existing output.

    Returns
    -------
    dict
        ``cells`` explained, ``types``, ``deletion_test``, ``verdict``, ``completeness`` (relative errors),
        ``output``, ``seconds``.

    Raises
    ------
    InputError
        For every fault of the input that a user can mend.

    Examples
    --------
    >>> explain_file("query.h5ad", "my_model", "explained")["verdict"]  # doctest: +SKIP
    'Deletion test: trust integrated_gradients (its 20 genes cost 4.12 of margin, random ones 0.31).'
    """
    started = time.perf_counter()
    check_sizes(cells_per_type, n_top, n_steps)
    check_output_folder(output, overwrite, marker=RESULTS)
    known = None if markers is None else read_marker_table(markers)
    names = None if marker_names is None else read_json(Path(marker_names).read_text(encoding="utf-8"))
    sets = None if gene_sets is None else read_gmt(gene_sets)
    loaded = load_model(model_or_shipped(model), device="cpu", dtype="float32")
    adata = read_cells(query, layer=layer)
    if label_key is not None:
        find_labels(adata.obs, label_key, "the cells")
    binned = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress=False)
    bins, found = binned.all_bins(), binned.alignment
    # of the columns, as the model names them
    genes = [found.panel[place] if place >= 0 else name for place, name in zip(found.target, found.names)]
    predicted = predict_cells(loaded, bins)["logits"].argmax(axis=1)
    rows = choose_cells(predicted, np.diff(bins.indptr) > 0, cells_per_type, seed)
    targets, part = predicted[rows], bins[rows]
    found, completeness = explanations(loaded, part, targets, n_steps, seed)
    deleted = deletion_test(loaded, part, targets, found, n_top, seed=seed)
    per_type = {name: mean_by_type(values, targets, loaded) for name, values in found.items()}
    types = np.array(loaded.labels, dtype=object)[predicted]
    obs = adata.obs.assign(**{PREDICTED: types})
    named = anndata.AnnData(select_matrix(adata, layer)[0], obs, pd.DataFrame(index=genes))
    with partial_folder(output, overwrite, marker=RESULTS) as folder:
        tables = write_tables(folder, per_type, n_top, known, names, sets)
        write_agreement(folder, per_type, named, label_key or PREDICTED, input)
        write_pictures(folder, found[GRADIENTS], per_type, part, targets, loaded, n_top)
        deleted.to_csv(folder / "deletion_test.csv", index=False)
        add_columns(adata, per_type, tables["top_genes"], genes)
        atomic_write_h5ad(adata, folder / "explained.h5ad", inputs=(query,))
        result = {
            "cells": len(rows),
            "types": list(next(iter(per_type.values())).columns),
            "verdict": verdict(deleted),
            "completeness": completeness,
            # a ratio to a fall of nothing is no number, and JSON has none for it
            "deletion_test": deleted.astype(object).where(deleted.notna(), None).to_dict("records"),
            "seconds": time.perf_counter() - started,
        }
        written = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / RESULTS).write_text(written + "\n", encoding="utf-8")
    decisive = tables["top_genes"][lambda top: top["explanation"] == GRADIENTS]
    for cell_type, top in decisive.groupby("cell_type"):
        logger.info("%s: %s", cell_type, ", ".join(top["gene"].head(8)))
    show(deleted, completeness, result["verdict"])
    logger.info(
        f"Written to {output}: tables and pictures of {result['cells']:,} cells, and explained.h5ad; "
        f"{result['seconds']:.0f} s."
    )
    return {**result, "output": str(output)}


def write_tables(
    folder: Path,
    per_type: dict[str, pd.DataFrame],
    n_top: int,
    markers: dict[str, list[str]] | None,
    marker_names: dict[str, Any] | None,
    gene_sets: dict[str, list[str]] | None,
) -> dict[str, pd.DataFrame]:
    """Top genes, scores of all genes, overlap with markers and enrichment, as CSV."""
    tables: dict[str, list[pd.DataFrame]] = {"top_genes": [], "marker_overlap": [], "enrichment": []}
    for name, scores in per_type.items():
        scores.to_csv(folder / f"{name}.csv", index_label="gene")
        top = top_genes_table(scores, n_top)
        by_type = {cell_type: list(rows["gene"]) for cell_type, rows in top.groupby("cell_type", sort=False)}
        tables["top_genes"].append(top.assign(explanation=name))
        # only genes that some explained cell has could have been on top
        background = list(scores.index[(scores != 0).any(axis=1)])
        if markers is not None:
            overlap = marker_overlap(by_type, markers, background, marker_names)
            tables["marker_overlap"].append(overlap.assign(explanation=name))
        if gene_sets is not None:
            enriched = enrich_by_type(by_type, gene_sets, background)
            tables["enrichment"].append(enriched.assign(explanation=name))
    written = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}
    for name, table in written.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return written


def write_agreement(
    folder: Path, per_type: dict[str, pd.DataFrame], adata: anndata.AnnData, label_key: str, input: str
) -> None:
    """Agreement with differential expression as CSV; nothing where fewer than two types can be compared."""
    tables = []
    for name, scores in per_type.items():
        try:
            table = differential_expression_agreement(scores, adata, label_key, input=input)
        except InputError as error:
            logger.warning("Differential expression was left out: %s", error)
            return
        tables.append(table.assign(explanation=name, types="predicted" if label_key == PREDICTED else "true"))
    pd.concat(tables, ignore_index=True).to_csv(folder / "de_agreement.csv", index=False)


def write_pictures(
    folder: Path,
    contributions: np.ndarray,
    per_type: dict[str, pd.DataFrame],
    bins: sp.csr_matrix,
    targets: np.ndarray,
    loaded: LoadedModel,
    n_top: int,
) -> None:
    """A heat map of top genes for every explanation, a summary plot of the contributions to every type."""
    for name, scores in per_type.items():
        plot_top_genes(top_genes_table(scores, n_top), scores, folder / f"top_genes_{name}.png")
    for target in np.unique(targets):
        cells, label = np.flatnonzero(targets == target), loaded.labels[target]
        file = "".join(c if c.isalnum() else "_" for c in label[:50])
        plot_summary(
            contributions[cells],
            bins[cells],
            loaded.tokenizer.gene_panel,
            folder / f"summary_{target}_{file}.png",
            n_genes=min(20, n_top),
            title=f"{shortened(label, 50)}: integrated gradients of {len(cells)} cells",
        )


def add_columns(
    adata: anndata.AnnData, per_type: dict[str, pd.DataFrame], top: pd.DataFrame, genes: list[str]
) -> None:
    """Put ``var["scbert_NAME"]`` (mean size over types), ``varm`` (per type) and ``uns["scbert_explanation"]``."""
    for name, scores in per_type.items():
        if len(genes) == adata.n_vars:
            # genes that the model does not have: no value
            values = scores.reindex(genes)
            adata.var[f"scbert_{name}"] = values.abs().mean(axis=1).to_numpy(dtype=np.float32)
            adata.varm[f"scbert_{name}"] = values.to_numpy(dtype=np.float32)
    # arrays and no data frame: types such as CD8+/CD45RA+ cannot be HDF5 keys
    adata.uns["scbert_explanation"] = {
        "types": np.array(next(iter(per_type.values())).columns, dtype=object),
        "top_genes": {
            name: top[name].to_numpy() for name in ("explanation", "cell_type", "rank", "gene", "z_score")
        },
    }


def show(deleted: pd.DataFrame, completeness: dict[str, float], sentence: str) -> None:
    """Print the deletion test, the completeness check and the verdict on stderr."""
    rows = [
        [
            name,
            f"{row['drop']:.3f}",
            f"{row['random_drop']:.3f}",
            "" if np.isnan(row["ratio"]) else f"{row['ratio']:.1f}",
            f"{row['cells_hurt_more']:.0%}",
            f"{completeness[name]:.1%}" if name in completeness else "",
        ]
        for name, row in deleted.set_index("explanation").iterrows()
    ]
    removed = int(deleted["genes_removed"].iloc[0])
    columns = [
        "explanation",
        "its top genes",
        "random genes",
        "ratio",
        "cells hurt more",
        "completeness error",
    ]
    console = Console(stderr=True, highlight=False)
    title = f"Fall of the margin (logit of a cell's type less the next one's) without {removed} genes"
    console.print(TextTable(title, columns, rows).rich())
    console.print(sentence, markup=False)
