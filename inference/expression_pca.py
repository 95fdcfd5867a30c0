"""Principal components of the expression itself: what clusters and pictures of cells are made of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from ..data.read import log_normalize, matrix_rows
from ..data.read_backed import BackedCells
from ..extras import require
from ..tokenization import detect_input_kind
from ..tokenization.cells_scbert import sample_rows
from ..tokenization.expression_scbert import as_csr
from .query import CHUNK_SIZE

N_VARIABLE_GENES = 2000
N_COMPONENTS = 50


def expression_pca(
    adata: AnnData | BackedCells,
    layer: str | None = None,
    input: str = "auto",
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """
    A cell's place by its own expression: ``obsm["X_pca"]``, or principal components of highly variable genes.

    The former is not taken where cells lack it, as of files that were brought together.

    The usual way of scanpy: log1p of counts per 10,000, 2,000 variable genes, 50 components, or as many as cells and
    genes allow: float32 [cells, components]. `rows` are the sorted rows of the cells wanted; all of them if left out.

    Source: Zheng et al. 2017 and Satija et al. 2015, as scanpy does it.

    Examples
    --------
    >>> counts = np.random.default_rng(0).poisson(2, size=(60, 40)).astype(np.float32)
    >>> expression_pca(AnnData(counts)).shape
    (60, 39)
    """
    rows = np.arange(adata.n_obs) if rows is None else rows
    if "X_pca" in adata.obsm:
        components = np.asarray(adata.obsm["X_pca"][:], dtype=np.float32)[rows]
        if np.isfinite(components).all():
            return components
    scanpy = require("scanpy")
    values, genes = log_rows(adata, rows, layer, input)
    cells = AnnData(values, var=pd.DataFrame(index=genes))
    scanpy.pp.filter_genes(cells, min_cells=1)
    if cells.n_vars > N_VARIABLE_GENES:
        scanpy.pp.highly_variable_genes(cells, n_top_genes=N_VARIABLE_GENES)
        cells = cells[:, cells.var["highly_variable"].to_numpy()].copy()
    components = min(N_COMPONENTS, cells.n_obs - 1, cells.n_vars - 1)
    if components < 1:
        return np.zeros((cells.n_obs, 1), dtype=np.float32)
    return scanpy.pp.pca(cells.X, n_comps=components, random_state=0, dtype="float32")


def log_rows(
    adata: AnnData | BackedCells, rows: np.ndarray, layer: str | None, input: str
) -> tuple[sp.csr_matrix, list[str]]:
    """`log_normalize` of sorted rows of cells that may be on disk; what the values are is told by a sample of all."""
    matrix, names = matrix_rows(adata, layer)
    kind = detect_input_kind(sample_rows(matrix)) if input == "auto" else input
    parts = []
    # in slices, which are cheap on disk
    for start in range(0, matrix.shape[0], CHUNK_SIZE):
        wanted = rows[(rows >= start) & (rows < start + CHUNK_SIZE)] - start
        if len(wanted):
            parts.append(as_csr(matrix[start : start + CHUNK_SIZE])[wanted])
    part = AnnData(sp.vstack(parts, format="csr"), var=pd.DataFrame(index=names))
    return log_normalize(part, input=kind)
