"""Cell types for every cell of an AnnData or a file."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.check_paths import check_output_path
from ..data.labels import UNASSIGNED
from ..extras import versions
from ..tokenization import InputError
from ..trained_model.loaded_model import LoadedModel, load_model
from ..trained_model.prediction import log_batch_size, predict_probabilities
from .annotate_processes import main, sharded_prediction
from .assignment import assign
from .parts import NewRows, add_parts, rows_for, rows_in_memory, write_parts
from .query import BinnedQuery, opened, overlap_numbers, progress_bar
from .report import write_annotation_report
from .shipped import doubts, model_or_shipped
from .voting import LEIDEN, check_vote, leiden_groups, majority_vote, vote_notes

logger = logging.getLogger(__name__)


def annotate(
    adata: AnnData,
    model: str | Path | LoadedModel | None = None,
    threshold: float | None = None,
    *,
    majority_vote: str | None = None,
    layer: str | None = None,
    input: str = "auto",
    batch_size: int | None = None,
    force: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    gene_table: str | Path | None = None,
) -> AnnData:
    """
    Give every cell a cell type and a confidence.

    Parameters
    ----------
    adata
        Cells, with gene symbols in `var_names`; labels are not needed. Left as it is.
    model
        Fine-tuned model folder, or what `load_model` returned; the annotator that ships with the package (human
        blood) if left out.
    threshold
        Cells whose largest probability is below it are "unassigned". Default: what fine-tuning chose on its
        validation cells and stored in the config; 0.5 where it had nothing to choose it on.
    majority_vote
        Column of `obs` whose groups get one label each; ``"leiden"`` for fine Leiden clusters (of
        ``obsm["X_pca"]`` if there is one, else of the model's embeddings).
    layer
        Layer that holds the values, or ``"raw"``; X by default.
    input
        What the values are: ``"auto"``, ``"counts"`` or ``"log1p"``.
    batch_size
        Cells per step; chosen by the memory if left out. It does not change the results.
    force
        Go on where less than 30% of the model's genes are found.
    device, dtype
        See `load_model`.
    progress
        Show bars on stderr.
    gene_table
        Table of other gene names (HGNC complete set, NCBI gene_info), or ``"hgnc"`` to download it once; names
        are matched exactly without it.

    Returns
    -------
    AnnData
        A copy, every cell in its place, with ``obs["scbert_cell_type"]``, ``obs["scbert_confidence"]``,
        ``obsm["scbert_probabilities"]`` (float32 [cells, labels]) and ``uns["scbert"]`` (`labels` in column order,
        model, threshold, gene overlap, versions). A cell that expresses no gene of the model is "unassigned" with
        confidence 0. With a vote also ``obs["scbert_majority_vote"]``, ``obs["scbert_majority_share"]`` (of the
        winner in the group) and ``obs["scbert_majority_confidence"]`` (mean probability of the winner), and a row
        for each group in ``uns["scbert"]["majority_vote"]``.

    Raises
    ------
    InputError
        When model, genes or values do not fit; the message says how to mend it.

    Examples
    --------
    >>> from scbert.inference import annotate  # doctest: +SKIP
    >>> annotated = annotate(adata, model="my_model")  # doctest: +SKIP
    >>> annotated.obs["scbert_cell_type"].value_counts()  # doctest: +SKIP
    """
    _check_threshold(threshold)
    loaded = load_model(model_or_shipped(model), "annotation", device, dtype)
    parts, _ = _annotation(
        adata, loaded, threshold, majority_vote, layer, input, batch_size, force, progress, gene_table
    )
    annotated = adata.to_memory() if adata.isbacked else adata.copy()
    add_parts(annotated, parts)
    return annotated


def annotate_file(
    query: str | Path,
    model: str | Path | LoadedModel | None,
    output: str | Path,
    *,
    threshold: float | None = None,
    majority_vote: str | None = None,
    layer: str | None = None,
    input: str = "auto",
    batch_size: int | None = None,
    force: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    gene_table: str | Path | None = None,
    genes_report: str | Path | None = None,
    report: str | Path | None = None,
    processes: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """
    Annotate a file; the output is the input with the columns of `annotate` added.

    The matrix of an .h5ad is read in chunks and copied from file to file, the names of its cells too, and probabilities
    wait for their output in a nameless file beside it: memory grows by some bytes a cell (label, confidence, place in
    the matrix). A vote by ``"leiden"`` takes more, and so do other formats than .h5ad. The output appears under its
    name when it is complete. Parameters as in `annotate`, and

    Parameters
    ----------
    query
        .h5ad, .zarr, 10x .h5 or 10x folder.
    output
        The .h5ad to write.
    overwrite
        Replace an existing output; the query itself is never replaced.
    genes_report
        CSV file to write: every gene matched, renamed, ambiguous, unused or absent.
    report
        HTML file to write: tables and pictures of the annotation.
    processes, resume
        Have so many processes predict, in shards that stand in ``OUTPUT.partial`` until the output is written; go
        on with the shards of an interrupted run.

    Returns
    -------
    dict
        Summary: cells, cells per label, gene overlap, device, seconds, notes.

    Raises
    ------
    InputError
        As `annotate`, and when the output exists or is the query.
    OSError
        When the output cannot be written.
    """
    started = time.monotonic()
    _check_threshold(threshold)
    check_output_path(output, overwrite, inputs=(query,))
    if genes_report is not None:
        check_output_path(genes_report, overwrite, inputs=(query, output, gene_table))
    if report is not None:
        check_output_path(report, overwrite, inputs=(query, output))
    model = model_or_shipped(model)
    predict_all = _predict_all
    if processes is not None or resume:
        settings = {"layer": layer, "input": input, "gene_table": gene_table, "batch_size": batch_size}
        predict_all = sharded_prediction(
            query, model, output, processes, resume, device=device, dtype=dtype, **settings
        )
    with opened(query, layer) as adata:
        loaded = load_model(model, "annotation", device, dtype)
        log_batch_size(loaded, batch_size)
        parts, summary = _annotation(
            adata,
            loaded,
            threshold,
            majority_vote,
            layer,
            input,
            batch_size,
            force,
            progress,
            gene_table,
            genes_report,
            predict_all,
            rows_for(adata, output),
        )
        if report is not None:
            # before the output: writing closes the query
            write_annotation_report(report, adata, parts, summary, overwrite)
        write_parts(query, adata, parts, output, overwrite)
    if predict_all is not _predict_all:
        predict_all.finish()
    return {"output": str(output), **summary, "seconds": time.monotonic() - started}


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"The threshold is {threshold}; it must lie between 0 and 1.")


def _annotation(
    adata,
    loaded,
    threshold,
    vote_key,
    layer,
    input,
    batch_size,
    force,
    progress,
    gene_table=None,
    genes_report=None,
    predict_all=None,
    new_rows=rows_in_memory,
):
    """Annotation of an AnnData as ``{"obs": ..., "obsm": ..., "uns": ...}``, and a summary."""
    check_vote(adata, vote_key)
    threshold = loaded.threshold if threshold is None else threshold
    query = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress, gene_table, genes_report)
    by_embedding = vote_key == LEIDEN and LEIDEN not in adata.obs and "X_pca" not in adata.obsm
    predict_all = predict_all or _predict_all
    probabilities, embeddings = predict_all(query, loaded, batch_size, by_embedding, progress, new_rows)
    names = loaded.labels
    labels, confidence = assign(probabilities, names, threshold)
    obs = {"scbert_cell_type": labels, "scbert_confidence": confidence}
    uns = {
        "labels": np.array(names, dtype=object),
        "model": loaded.name,
        "threshold": float(threshold),
        "gene_overlap": overlap_numbers(query.alignment),
        "versions": versions(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    notes = _notes(adata, query, obs) + doubts(query.alignment, labels, names)
    if vote_key is not None:
        vote = _vote(adata, vote_key, labels, probabilities, names, embeddings)
        obs["scbert_majority_vote"] = vote.labels
        obs["scbert_majority_share"] = vote.shares
        obs["scbert_majority_confidence"] = vote.confidences
        if vote_key == LEIDEN and LEIDEN not in adata.obs:
            obs["scbert_leiden"] = pd.Categorical(vote.groups.astype(str))
        # arrays and no data frame: a group or label may have a name that is no HDF5 key
        columns = {name: vote.table[name].to_numpy() for name in vote.table}
        uns["majority_vote"] = {"key": vote_key, "ties": len(vote.ties), "mixed": len(vote.mixed), **columns}
        notes += vote_notes(vote)
    for note in notes:
        logger.warning(note)
    parts = {"obs": obs, "obsm": {"scbert_probabilities": probabilities}, "uns": {"scbert": uns}}
    return parts, _summary(labels, confidence, loaded, query, notes)


def _predict_all(
    query: BinnedQuery, loaded: LoadedModel, batch_size, embed: bool, progress: bool, new_rows: NewRows
):
    """Probabilities [cells, labels] and, if asked for, embeddings [cells, hidden]; zeros for empty cells."""
    probabilities = new_rows((query.n_cells, len(loaded.labels)))
    embeddings = new_rows((query.n_cells, loaded.model.config.hidden_size)) if embed else None
    with progress_bar(query.n_cells, "Annotating", progress) as bar:
        for start, bins in query.chunks():
            cells = slice(start, start + bins.shape[0])
            probabilities[cells], vectors = predict_probabilities(loaded, bins, batch_size, embed, bar.update)
            if embed:
                embeddings[cells] = vectors
    return probabilities, embeddings


def _vote(adata, key, labels, probabilities, names, embeddings):
    if key in adata.obs:
        groups = adata.obs[key]
    else:
        groups = leiden_groups(np.asarray(adata.obsm["X_pca"]) if embeddings is None else embeddings[:])
    return majority_vote(labels, groups, probabilities, names)


def _notes(adata: AnnData, query: BinnedQuery, obs: dict) -> list[str]:
    notes = []
    if query.n_empty:
        notes.append(
            f"{query.n_empty} cell(s) express no gene of the model's panel: unassigned, with confidence 0."
        )
    replaced = [name for name in obs if name in adata.obs]
    if replaced:
        notes.append(f"Columns of an earlier annotation were replaced: {', '.join(replaced)}.")
    return notes


def _summary(labels, confidence, loaded: LoadedModel, query: BinnedQuery, notes: list[str]) -> dict[str, Any]:
    counts = pd.Series(labels).value_counts(sort=False).sort_values(ascending=False, kind="stable")
    alignment = query.alignment
    return {
        "cells": query.n_cells,
        "unassigned": int(counts.get(UNASSIGNED, 0)),
        "mean_confidence": float(confidence.mean()),
        "genes_found": alignment.n_matched,
        "genes_of_model": alignment.panel_size,
        "cells_per_label": {str(label): int(count) for label, count in counts.items()},
        "gene_overlap": overlap_numbers(alignment),
        "model": loaded.name,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "notes": notes,
    }


if __name__ == "__main__":
    sys.exit(main(annotate_file))
