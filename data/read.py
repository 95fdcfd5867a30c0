"""
Files to AnnData: .h5ad, .zarr, .h5mu, 10x .h5 and 10x matrix folders, checked at the door; AnnData to its values, by
rows or on the scale of log1p CP10k.
"""

import contextlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import scipy.sparse as sp

from ..tokenization import (
    InputError,
    align_genes,
    detect_input_kind,
    gene_names_of,
    normalize_expression,
    read_gene_panel,
    select_matrix,
)
from ..tokenization.cells_scbert import check_shape, other_sources
from ..tokenization.expression_scbert import as_csr, check_values, expm1, log1p_scale
from .modalities import read_mudata
from .paths import check_cells_path, is_zarr
from .read_10x import read_10x_folder, read_10x_h5

CHUNK_SIZE = 4096
# values of a CSC file looked at together while its rows are gathered
COLUMN_BLOCK = 4_000_000
# values of such rows kept for the slices to come
KEPT_VALUES = 8_000_000
# rows taken together where all are passed over
ROW_BLOCK = 1 << 14


def read_cells(path, layer=None, backed=False, check=True, every_feature=False):
    """Cells of a file or folder as an AnnData, refused if they cannot be annotated or learnt from.

    `path` is an .h5ad, .h5 (10x), .h5mu or .zarr, or a folder with a 10x matrix.mtx, gzip-compressed or not; an AnnData
    is checked and comes back as it is. The `layer` whose values will be used, ``"raw"`` or X, is only checked here.
    `backed` leaves the matrix of an .h5ad, or of an AnnData on disk, where it is: its values are then checked as they
    are read. Else `check` looks for negative, NaN and infinite values, and for a matrix of zeros, now. `every_feature`
    keeps the features of a 10x or MuData file other than gene expression, such as peaks.
    """
    if isinstance(path, anndata.AnnData):
        adata, path = path, "The AnnData"
        if adata.isbacked and not backed:
            adata = adata.to_memory()
    else:
        path = check_cells_path(path)
        # repeated gene or cell names are dealt with, old formats are read all the same
        with _clear_errors(path), warnings.catch_warnings(action="ignore"):
            adata = _read_file(path, backed, every_feature)
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(
            f"{path} holds {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed."
        )
    matrix, _ = select_matrix(adata, layer)
    if check and not adata.isbacked:
        check_values(matrix)
        if matrix.max() == 0:
            raise InputError(
                f"Every value of {path} is zero: no cell expresses any gene. Check how the file was written, or take "
                f"another matrix.{other_sources(adata, layer)}"
            )
    return adata


def _read_file(path, backed, every_feature):
    if path.is_dir():
        return anndata.read_zarr(path) if is_zarr(path) else read_10x_folder(path, every_feature)
    if not h5py.is_hdf5(path):
        raise InputError(
            f"{path} is not valid HDF5 (corrupt, truncated or another format). An .h5ad file was needed."
        )
    with h5py.File(path, "r") as file:
        if "mod" in file:
            return read_mudata(path, every_feature=every_feature)
        if _is_10x_h5(file):
            return read_10x_h5(path, every_feature)
        if isinstance(file.get("X"), h5py.Dataset):
            check_shape(file["X"])
        # as anndata wrote it before 0.7: its tables are arrays, to which no column could be added on disk
        backed = backed and isinstance(file.get("obs"), h5py.Group)
    return anndata.read_h5ad(path, backed="r" if backed else None)


def _is_10x_h5(file):
    """Whether an open HDF5 file is one of Cell Ranger's."""
    if "obs" in file or "var" in file:
        return False
    return "matrix" in file or any(
        isinstance(group, h5py.Group) and "barcodes" in group for group in file.values()
    )


@contextlib.contextmanager
def _clear_errors(path):
    """The many ways a damaged file fails, as one message."""
    try:
        yield
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"{path} cannot be read: its permissions do not allow it.") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into memory. Split it into several files.") from None
    # h5py, zarr and anndata raise a dozen types for a damaged file
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} cannot be read: it is corrupt, truncated or in another format ({reason[0]})."
        ) from error


def opened_cells(path, **options):
    """The cells of a file whose matrices stay on disk where its format allows it; see `read_cells`."""
    return closing(read_cells(path, backed=True, **options))


@contextlib.contextmanager
def closing(adata):
    """These cells for a block, at whose end their file is closed, if they have one open."""
    try:
        yield adata
    finally:
        if adata.isbacked:
            adata.file.close()


def matrix_rows(cells, layer=None, panel=None):
    """Something that gives rows of a matrix by slice, and its columns' names, for a `panel` (see `gene_names_of`).

    The matrix of `cells`, in memory or backed, may be CSR, CSC or dense. What comes back has a `shape`, and its
    ``[start:stop]`` is cheap in time or flat in memory.
    """
    matrix, source = select_matrix(cells, layer)
    if getattr(matrix, "format", None) == "csc":
        matrix = matrix.tocsr() if sp.issparse(matrix) else CscRows(matrix)
    return matrix, gene_names_of(source.var, source.var_names, panel)


def log_normalize(
    adata: Any, layer: str | None = None, input: str = "auto", panel: Sequence[str] | None = None
) -> tuple[Any, list[str]]:
    """
    Natural log1p of counts per 10,000, CSR float32 [cells, genes], and the names of its columns, each once.

    `input` says what the values of X or the `layer`, a name or ``"raw"``, are: ``"counts"``, ``"log1p"`` or ``"auto"``.
    Columns of one name are summed as counts. Values that are neither are refused. The names are gene symbols, or what
    a `panel` has more of (see `gene_names_of`).

    Examples
    --------
    >>> cells = anndata.AnnData(np.array([[1.0, 3.0]], dtype=np.float32))
    >>> log_normalize(cells)[0].toarray().round(2).astype(str).tolist()
    [['7.82', '8.92']]
    """
    matrix, source = select_matrix(adata, layer)
    csr = as_csr(matrix)
    kind = detect_input_kind(csr) if input == "auto" else input
    names = gene_names_of(source.var, source.var_names, panel)
    unique = list(dict.fromkeys(names))
    counts = align_genes(names, unique).apply(to_counts_scale(csr, kind))
    if kind == "log1p":
        # already per 10,000 over all genes of the file; a second size factor over those left would change it.
        counts = counts.copy()
        counts.data = np.log1p(counts.data).astype(np.float32)
        return counts, unique
    return normalize_expression(counts, target_sum=1e4, log_base=math.e), unique


def to_counts_scale(csr, kind):
    """Values on the scale of counts: those of the kind ``"counts"`` as they are, ``expm1`` of ``"log1p"`` in float64.

    Rows of the latter are rescaled to 10,000 if they share another sum.
    """
    if kind == "counts":
        return csr
    values, scale = expm1(csr), log1p_scale(csr)
    if scale not in (None, 1e4):
        values.data *= 1e4 / scale
    return values


def row_blocks(n_rows):
    """Slices that cover `n_rows` rows in order."""
    for start in range(0, n_rows, ROW_BLOCK):
        yield slice(start, min(start + ROW_BLOCK, n_rows))


class CscRows:
    """Rows of a CSC matrix on disk, gathered by passing over its columns in blocks.

    To gather rows is to read the whole matrix (`anndata.abc.CSCDataset`): the rows that follow are gathered with those
    asked for, some KEPT_VALUES in all, and wait in memory for the next slice, beside one block of columns.
    """

    def __init__(self, dataset):
        self._group, self.shape = dataset.group, dataset.shape
        self._kept, self._first = sp.csr_matrix((0, self.shape[1])), 0

    def __getitem__(self, rows):
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError("rows of a CSC matrix are taken in steps of 1")
        if start < self._first or stop > self._first + self._kept.shape[0]:
            n_values = max(1, int(self._group["indptr"][-1]))
            # those of before give way first
            self._kept = None
            n_rows = max(stop - start, KEPT_VALUES * self.shape[0] // n_values)
            self._kept, self._first = self._gather(start, min(start + n_rows, self.shape[0])), start
        return self._kept[start - self._first : stop - self._first]

    def _gather(self, start, stop):
        indptr = self._group["indptr"][:]
        blocks = []
        for first, last in _column_blocks(indptr):
            begin, end = indptr[first], indptr[last]
            row = self._group["indices"][begin:end]
            kept = np.flatnonzero((row >= start) & (row < stop))
            ends = np.searchsorted(kept, indptr[first : last + 1] - begin)
            values = self._group["data"][begin:end][kept], row[kept] - start, ends
            blocks.append(sp.csc_matrix(values, shape=(stop - start, last - first)))
        return sp.hstack(blocks, format="csr")


def _column_blocks(indptr):
    """Ranges of columns with some COLUMN_BLOCK values each."""
    first, n_columns = 0, len(indptr) - 1
    while first < n_columns:
        last = int(np.searchsorted(indptr, indptr[first] + COLUMN_BLOCK, side="right")) - 1
        last = min(max(last, first + 1), n_columns)
        yield first, last
        first = last


def read_gene_names(path):
    """Ordered gene names, each once, from a text file (one per line, .txt, .csv, .gz) or the var_names of an .h5ad."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no gene file {path}.")
    if not h5py.is_hdf5(path):
        return read_gene_panel(path)
    with opened_cells(path, check=False) as adata:
        names = gene_names_of(adata.var, adata.var_names)
    if len(set(names)) < len(names):
        raise InputError(f"{path} names {len(names) - len(set(names))} gene(s) more than once.")
    return names
