"""Cell types for every cell of an AnnData or a file."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.disk_matrix import DiskMatrix
from ..data.labels import UNASSIGNED
from ..data.paths import ANNOTATION_FORMATS, check_output_path
from ..data.read import read_cells
from ..data.read_backed import BackedCells
from ..tokenization import InputError
from ..trained_model.model_folder import check_outside, load_model
from ..trained_model.prediction import LoadedModel, check_batch_size, log_batch_size, predict_probabilities
from .annotate_processes import ShardedPrediction, main
from .assignment import (
    COLUMNS,
    assign,
    novel_share,
    prediction_sets,
    set_sizes,
    set_words,
    shift_notes,
    wider_answers,
)
from .expression_pca import expression_pca
from .query import BinnedQuery, add_parts, opened, progress_bar, run_facts, write_parts
from .report import cell_coordinates, write_annotation_report
from .shipped import doubts, few_genes, model_or_shipped
from .voting import check_vote, leiden_groups, majority_vote, vote_notes

logger = logging.getLogger(__name__)


def annotate(
    cells: AnnData | str | Path,
    model: str | Path | LoadedModel | None = None,
    threshold: float | None = None,
    *,
    tissue: str | None = None,
    coverage: float | None = None,
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
    cells
        An AnnData with gene symbols in `var_names`, which is left as it is, or a file: .h5ad, .zarr, 10x .h5 or
        folder. Labels are not needed.
    model
        Fine-tuned model folder, the ``user/name`` of one on the Hub, or a loaded model.
    threshold
        Cells whose largest probability is below it are "unassigned". Default: what fine-tuning chose on its
        validation cells and stored in the config; 0.5 where it had nothing to choose it on.
    tissue
        Without a model, an annotator that ships (`scbert models`): ``"blood"``, also taken and introduced without it,
        or ``"tissue"``, broad types of human tissue.
    coverage
        Also give every cell a set of types that holds the true one in this share of cells, such as 0.9: of cells like
        the reference's, known types only. The model keeps the shares it can do.
    majority_vote
        Column of `obs` whose groups get one label each; ``"leiden"`` for fine Leiden clusters of the expression (of
        ``obsm["X_pca"]`` if there is one, else of principal components of highly variable genes). Clusters that do not
        follow the types, most of them mixed, are no help: the vote is then left out, and a warning says so.
    layer
        Layer that holds the values, or ``"raw"``; X by default.
    input
        What the values are: ``"auto"``, ``"counts"`` or ``"log1p"``.
    batch_size
        Cells per step; chosen by the memory if left out. It does not change the results.
    force
        Go on where less than 30% of the model's genes are found.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``...; by default the first GPU, or else the CPU.
    dtype
        ``"float32"`` or ``"bfloat16"``; by default bfloat16 on GPUs that have it, float32 elsewhere.
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
        confidence 0.

        A model taught terms adds ``obs["scbert_cell_type_ontology_term_id"]`` (``"unknown"`` without one, as
        CELLxGENE's schema wants it). One taught wider types adds ``obs["scbert_cell_type_backoff"]``, the deepest type
        whose summed probability reaches the threshold, and its ``obs["scbert_cell_type_backoff_ontology_term_id"]``.
        With `coverage` there is ``obs["scbert_prediction_set"]``: labels joined by "|", ``""`` where none is likely
        enough. With a vote also ``obs["scbert_majority_vote"]``, ``obs["scbert_majority_share"]`` (of the winner in
        the group) and ``obs["scbert_majority_confidence"]`` (mean probability of the winner), and a row
        for each group in ``uns["scbert"]["majority_vote"]``.

    Raises
    ------
    InputError
        When model, genes or values do not fit; the message says how to mend it.

    Examples
    --------
    >>> import scanpy, scbert
    >>> adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()  # 765 genes: few for the annotator that ships
    >>> annotated = scbert.annotate(adata, input="log1p", force=True, progress=False)
    >>> [name for name in annotated.obs if name.startswith("scbert")][:2]
    ['scbert_cell_type', 'scbert_confidence']
    """
    _check_numbers(threshold, batch_size)
    adata = read_cells(cells, layer=layer, check=False)
    if majority_vote is not None:
        check_vote(adata, majority_vote)
    loaded = _load_annotator(model_or_shipped(model, tissue), device, dtype, coverage)
    query = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress, gene_table)
    probabilities = _predict_all(query, loaded, batch_size, progress)
    parts, _ = _annotation(adata, query, loaded, probabilities, threshold, coverage, majority_vote)
    # cells that were read here are ours to change
    return add_parts(adata.copy() if adata is cells else adata, parts)


def annotate_file(
    query: str | Path,
    model: str | Path | LoadedModel | None,
    output: str | Path,
    *,
    tissue: str | None = None,
    threshold: float | None = None,
    coverage: float | None = None,
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
        The .h5ad to write; or a .csv of labels and confidences, a row per cell.
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
    _check_numbers(threshold, batch_size)
    check_output_path(output, overwrite, inputs=(query,), suffix=ANNOTATION_FORMATS)
    for written, others in ((genes_report, (output,)), (report, (output, genes_report))):
        if written is not None:
            check_output_path(written, overwrite, inputs=(query, gene_table), outputs=others)
    model, shards = model_or_shipped(model, tissue), None
    check_outside(model, output, genes_report, report)
    if processes is not None or resume:
        options = {"layer": layer, "input": input, "device": device, "dtype": dtype, "batch_size": batch_size}
        shards = ShardedPrediction(query, model, output, overwrite, processes, resume, gene_table, **options)
    with opened(query, layer) as adata, ExitStack() as held:
        if majority_vote is not None:
            check_vote(adata, majority_vote)
        loaded = _load_annotator(model, device, dtype, coverage)
        log_batch_size(loaded, batch_size)
        binned = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress, gene_table, genes_report)
        if shards is None:
            probabilities = _predict_all(binned, loaded, batch_size, progress, output)
        else:
            probabilities = shards.predict(binned, loaded, progress, held)
        parts, summary = _annotation(adata, binned, loaded, probabilities, threshold, coverage, majority_vote)
        if report is not None:
            # before the output: writing closes the query
            places = cell_coordinates(adata, layer, input)
            write_annotation_report(report, adata, parts, summary, places, overwrite)
        write_parts(query, adata, parts, output, overwrite)
        if shards is not None:
            shards.finish()
    seconds = time.monotonic() - started
    logger.info(
        f"Written to {output}: {summary['cells']:,} cells in {seconds:.1f} s, {summary['unassigned']:,} of them "
        f"unassigned; mean confidence {summary['mean_confidence']:.2f}."
    )
    return {"output": str(output), **summary, "seconds": seconds}


def _load_annotator(model: Any, device: str | None, dtype: str | None, coverage: float | None) -> LoadedModel:
    loaded = load_model(model, "annotation", device, dtype)
    if coverage is not None:
        loaded.quantiles(coverage)
    return loaded


def _check_numbers(threshold: float | None, batch_size: int | None) -> None:
    if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
        raise InputError(f"The threshold is {threshold!r}; it must be a number from 0 to 1.")
    check_batch_size(batch_size)


def _annotation(
    adata: AnnData | BackedCells,
    query: BinnedQuery,
    loaded: LoadedModel,
    probabilities: np.ndarray | DiskMatrix,
    threshold: float | None,
    coverage: float | None,
    vote_key: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Annotation of an AnnData as ``{"obs": ..., "obsm": ..., "uns": ..., "stale": [...]}``, and a summary."""
    threshold, names = loaded.threshold if threshold is None else threshold, loaded.labels
    labels, confidence = assign(probabilities, names, threshold)
    obs = {"scbert_cell_type": labels, "scbert_confidence": confidence}
    obs |= wider_answers(probabilities, names, threshold, labels, loaded.model.config)
    uns, told = run_facts(query, loaded)
    uns |= {"labels": np.array(names, dtype=object), "threshold": float(threshold)}
    sizes = None
    if coverage is not None:
        sets, sizes = prediction_sets(probabilities, names, loaded.quantiles(coverage))
        obs["scbert_prediction_set"] = sets
        uns |= {"coverage": float(coverage), "prediction_set_sizes": sizes}
    notes = [*query.alignment.notes(), *few_genes(query.alignment), *doubts(labels, names)]
    if query.n_empty:
        notes.append(
            f"{query.n_empty:,} cell(s) express no gene of the model's panel: unassigned, with confidence 0."
        )
    if not loaded.tells_novelty_without(query.alignment.absent):
        notes.append(
            "Too many genes that tell new types are absent: no cell is unassigned for being of a new type."
        )
    notes += [] if coverage is None else shift_notes(probabilities)
    if 0 < threshold < loaded.threshold and (share := novel_share(probabilities)):
        notes.append(
            f"{share:.1%} of the cells look like none of the model's types. The threshold asked for is below the "
            f"model's, {loaded.threshold:g}: such cells may have a name all the same."
        )
    if vote_key is not None:
        notes += _add_vote(obs, uns, adata, query, probabilities, names, vote_key)
    # groups that are voted in stay, whoever made them
    earlier = [name for name in COLUMNS if name in set(adata.obs) and (name in obs or name != vote_key)]
    if earlier:
        notes.append(f"Columns of an earlier annotation were replaced or removed: {', '.join(earlier)}.")
    parts = {"obs": obs, "obsm": {"scbert_probabilities": probabilities}, "uns": {"scbert": uns}}
    parts["stale"] = [name for name in earlier if name not in obs]
    counts = pd.Series(labels).value_counts(sort=False).sort_values(ascending=False, kind="stable")
    summary = {
        **told,
        "unassigned": int(counts.get(UNASSIGNED, 0)),
        "mean_confidence": float(confidence.mean()),
        "cells_per_label": {str(label): int(count) for label, count in counts.items()},
        "notes": notes,
    }
    if sizes is not None:
        summary["prediction_sets"] = set_sizes(coverage, sizes)
        logger.info(set_words(summary["prediction_sets"]))
    logger.info(f"Cells per type: {', '.join(f'{label} {count:,}' for label, count in counts.items())}.")
    for note in notes:
        logger.warning(note)
    return parts, summary


def _predict_all(
    query: BinnedQuery,
    loaded: LoadedModel,
    batch_size: int | None,
    progress: bool,
    output: str | Path | None = None,
) -> np.ndarray | DiskMatrix:
    """Probabilities [cells, labels]; zeros for empty cells."""
    probabilities = query.new_rows(len(loaded.labels), output)
    absent = query.alignment.absent
    with progress_bar(query.n_cells, "Annotating", progress) as bar:
        for start, bins in query.chunks():
            cells = slice(start, start + bins.shape[0])
            probabilities[cells] = predict_probabilities(loaded, bins, absent, batch_size, bar.update)
    return probabilities


def _add_vote(
    obs: dict[str, Any],
    uns: dict[str, Any],
    adata: AnnData | BackedCells,
    query: BinnedQuery,
    probabilities: np.ndarray | DiskMatrix,
    names: list[str],
    key: str,
) -> list[str]:
    """Put the majority vote into `obs` and `uns`, unless it is of clusters that are mixed; what is to be said of it."""
    labels, own_groups = obs["scbert_cell_type"], key not in adata.obs
    groups = leiden_groups(expression_pca(adata, query.layer, query.input)) if own_groups else adata.obs[key]
    vote = majority_vote(labels, groups, probabilities, names)
    if own_groups and 2 * len(vote.mixed) > len(vote.table):
        return [
            f"The majority vote was left out: {len(vote.mixed)} of the {len(vote.table)} Leiden clusters are mixed, so "
            "they do not follow the types, and a vote would have spread the commonest ones. Give clusters of your own "
            "(the name of a column of obs) to vote all the same."
        ]
    obs["scbert_majority_vote"] = vote.labels
    obs["scbert_majority_share"] = vote.shares
    obs["scbert_majority_confidence"] = vote.confidences
    # arrays and no data frame: a group or label may have a name that is no HDF5 key
    columns = {name: vote.table[name].to_numpy() for name in vote.table}
    uns["majority_vote"] = {"key": key, "ties": len(vote.ties), "mixed": len(vote.mixed), **columns}
    n_changed = int((labels.astype(object) != vote.labels.astype(object)).sum())
    told = f"The majority vote gave {n_changed:,} of {len(labels):,} cells another type than their own."
    if own_groups:
        obs["scbert_leiden"] = pd.Categorical(vote.groups.astype(str))
        told += (
            " Leiden clusters made fewer cells right wherever it was measured: trust scbert_cell_type first."
        )
    return [told, *vote_notes(vote)]


if __name__ == "__main__":
    sys.exit(main(annotate_file))
