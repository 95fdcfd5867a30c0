"""Embeddings of every cell of an AnnData or a file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from anndata import AnnData

from ..data.paths import check_output_path
from ..data.read import read_cells
from ..trained_model.model_folder import check_outside, load_model
from ..trained_model.prediction import LoadedModel, check_batch_size, log_batch_size, predict_cells
from .query import BinnedQuery, add_parts, opened, progress_bar, run_facts, write_parts

logger = logging.getLogger(__name__)

KEY = "X_scbert"
# what ships, for whoever names no model
PRETRAINED = "scbert-mini"


def embed(
    cells: AnnData | str | Path,
    model: str | Path | LoadedModel | None = None,
    *,
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
    Give every cell a vector: the model's cell token where it has one (``pooling="cell"``), else the mean of the last
    hidden states over expressed genes and the trailing token.

    Unexpressed genes are left out of the mean: there are ten times more of them, and they would drown a cell in
    what all cells share. A cell without any expressed gene gets the trailing token's vector. A cell token sums the
    vectors of the genes, each by its expression, and corrects the sum by attention (see `ScBertCell`).

    A fine-tuned model that makes cell vectors gives those: what it keeps of a cell to tell its types apart. To explore
    cells without a model's opinion, take ``scbert-mini``, which knows no types, or, within one study, the principal
    components of the expression: they keep types apart that a model was not taught.

    Parameters
    ----------
    cells
        An AnnData with gene symbols in `var_names`, which is left as it is, or a file.
    model
        Any scBERT model, pretrained or fine-tuned: a folder, a name on the Hub, or a loaded one; ``scbert-mini``, which
        ships with the package, if left out.
    layer, input, batch_size, force, device, dtype, progress, gene_table
        As in `annotate`.

    Returns
    -------
    AnnData
        A copy with ``obsm["X_scbert"]``, float32 [cells, hidden_size], and ``uns["scbert_embedding"]``.

    Raises
    ------
    InputError
        When model, genes or values do not fit; the message says how to mend it.

    Examples
    --------
    >>> import scanpy, scbert
    >>> adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()  # 765 genes: few for the model that ships
    >>> scbert.embed(adata, input="log1p", force=True, progress=False).obsm["X_scbert"].shape
    (700, 68)
    """
    check_batch_size(batch_size)
    adata = read_cells(cells, layer=layer, check=False)
    loaded = load_model(PRETRAINED if model is None else model, "embedding", device, dtype)
    binned = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress, gene_table)
    parts, _ = _embedding(binned, loaded, batch_size, progress)
    # cells that were read here are ours to change
    return add_parts(adata.copy() if adata is cells else adata, parts)


def embed_file(
    query: str | Path,
    model: str | Path | LoadedModel | None,
    output: str | Path,
    *,
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
) -> dict[str, Any]:
    """
    Embed a file: the output is the input with ``obsm["X_scbert"]`` added; see `embed` and `annotate_file`.

    Returns
    -------
    dict
        Summary: cells, size of the vectors, gene overlap, device, seconds.
    """
    started = time.monotonic()
    check_batch_size(batch_size)
    check_output_path(output, overwrite, inputs=(query,), suffix=".h5ad")
    if genes_report is not None:
        check_output_path(genes_report, overwrite, inputs=(query, gene_table), outputs=(output,))
    model = PRETRAINED if model is None else model
    check_outside(model, output, genes_report)
    with opened(query, layer) as adata:
        loaded = load_model(model, "embedding", device, dtype)
        log_batch_size(loaded, batch_size)
        binned = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress, gene_table, genes_report)
        parts, summary = _embedding(binned, loaded, batch_size, progress, output)
        write_parts(query, adata, parts, output, overwrite)
    seconds = time.monotonic() - started
    logger.info(
        f'Written to {output}: obsm["{KEY}"], {summary["cells"]:,} cells with {summary["hidden_size"]} numbers each, '
        f"in {seconds:.1f} s."
    )
    return {"output": str(output), **summary, "seconds": seconds}


def _embedding(
    query: BinnedQuery,
    loaded: LoadedModel,
    batch_size: int | None,
    progress: bool,
    output: str | Path | None = None,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Embedding of the cells as ``{"obsm": ..., "uns": ...}``, and a summary."""
    vectors = query.new_rows(loaded.embedding_size, output)
    with progress_bar(query.n_cells, "Embedding", progress) as bar:
        for start, bins in query.chunks():
            found = predict_cells(loaded, bins, ("embeddings",), batch_size, bar.update)
            vectors[start : start + bins.shape[0]] = found["embeddings"]
    about, told = run_facts(query, loaded)
    about["pooling"] = loaded.embedding_kind
    parts = {"obsm": {KEY: vectors}, "uns": {"scbert_embedding": about}}
    return parts, {**told, "hidden_size": vectors.shape[1]}
