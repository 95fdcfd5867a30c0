"""Files to AnnData: h5ad, zarr, 10x .h5 and 10x matrix folders, checked at the door."""

import contextlib
import logging
import warnings
import zipfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import scipy.sparse as sp

from ..tokenization import InputError, gene_names_of, read_gene_panel, select_matrix
from ..tokenization.expression_scbert import as_csr, check_values
from .read_10x import is_10x_folder, read_10x_folder, read_10x_h5

logger = logging.getLogger(__name__)

CHUNK_SIZE = 4096
# values of a CSC file looked at together while its rows are gathered
COLUMN_BLOCK = 4_000_000


def read_cells(path, layer=None, backed=False, check=True):
    """Read cells from a file or folder, and refuse what cannot be annotated or learnt from.

    Parameters
    ----------
    path : str, os.PathLike or anndata.AnnData
        .h5ad, .h5 (10x), .zarr, or a folder with a 10x matrix.mtx (gzip-compressed or not); an AnnData is checked
        and comes back as it is.
    layer : str, optional
        Layer whose values will be used, or ``"raw"``; X if left out. Only checked here: the AnnData comes
        back as it stands in the file.
    backed : bool
        Leave the matrix of an .h5ad on disk. Its values are then checked as they are read.
    check : bool
        Look for negative, NaN and infinite values now.

    Returns
    -------
    anndata.AnnData

    Raises
    ------
    InputError
        Saying what was found, what was needed and how to mend it.

    Examples
    --------
    >>> adata = read_cells("cells.h5ad")  # doctest: +SKIP
    """
    if isinstance(path, anndata.AnnData):
        adata, path = path, "The AnnData"
    else:
        adata = _read_file(Path(path), backed)
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(
            f"{path} holds {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed."
        )
    matrix, _ = select_matrix(adata, layer)
    if check and not adata.isbacked:
        check_values(matrix)
    return adata


def _read_file(path, backed):
    if not path.exists():
        raise InputError(f"There is no file {path}.")
    with _clear_errors(path), warnings.catch_warnings():
        # repeated gene or cell names are dealt with, old formats are read all the same
        warnings.simplefilter("ignore")
        return _read_any(path, backed)


def _read_any(path, backed):
    if path.is_dir():
        if path.suffix == ".zarr" or (path / ".zgroup").exists() or (path / "zarr.json").exists():
            return anndata.read_zarr(path)
        if is_10x_folder(path):
            return read_10x_folder(path)
        raise InputError(
            f"{path} is a folder without a 10x matrix.mtx or a zarr store in it; an .h5ad file was needed."
        )
    if zipfile.is_zipfile(path) and path.suffix == ".zarr.zip":
        return anndata.read_zarr(str(path))
    if not h5py.is_hdf5(path):
        raise InputError(_not_hdf5(path))
    if path.suffix == ".h5mu":
        # the reader of several modalities is built on this one
        from .multiomics import read_multiomics

        return read_multiomics(path)
    if _is_10x_h5(path):
        return read_10x_h5(path)
    return anndata.read_h5ad(path, backed="r" if backed else None)


def _not_hdf5(path):
    if path.stat().st_size == 0:
        return f"{path} is empty."
    if path.suffix.lower() in (".csv", ".tsv", ".txt", ".gz", ".mtx", ".loom", ".rds"):
        return (
            f"{path} is of a kind that is not read here; convert it to .h5ad (for instance with "
            f"scanpy.read(...).write_h5ad(...)), or give the folder that holds a 10x matrix.mtx."
        )
    return (
        f"{path} is no HDF5 file: it is damaged or cut short, or of another kind. An .h5ad file was needed."
    )


def _is_10x_h5(path):
    with h5py.File(path, "r") as file:
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
        raise InputError(f"{path} may not be read: check its permissions.") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into memory; read it backed, or in parts.") from None
    # h5py, zarr and anndata raise a dozen types for a damaged file
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} cannot be read; it is damaged, cut short or of another kind ({reason[0]})."
        ) from error


def matrix_rows(cells, layer=None):
    """Something that gives rows of a matrix by slice, and the names of its columns.

    Parameters
    ----------
    cells : anndata.AnnData
        In memory or backed; CSR, CSC or dense.
    layer : str, optional

    Returns
    -------
    matrix
        Has `shape`, and `matrix[start:stop]` is cheap in time or flat in memory.
    gene_names : list of str
    """
    matrix, source = select_matrix(cells, layer)
    if getattr(matrix, "format", None) == "csc":
        matrix = matrix.tocsr() if sp.issparse(matrix) else CscRows(matrix)
    return matrix, gene_names_of(source.var, source.var_names)


class CscRows:
    """Rows of a CSC matrix on disk, gathered by passing over its columns in blocks.

    Every slice reads the whole matrix once, so take large slices; memory holds one block of columns and
    the rows asked for.

    Parameters
    ----------
    dataset : anndata.abc.CSCDataset
    """

    def __init__(self, dataset):
        self._group = dataset.group
        self.shape = dataset.shape
        self.dtype = dataset.dtype

    def __getitem__(self, rows):
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError("rows of a CSC matrix are taken in steps of 1")
        indptr = self._group["indptr"][:]
        parts = []
        for first, last in _column_blocks(indptr):
            begin, end = indptr[first], indptr[last]
            row = self._group["indices"][begin:end]
            kept = np.flatnonzero((row >= start) & (row < stop))
            columns = np.searchsorted(indptr, kept + begin, side="right") - 1
            parts.append((self._group["data"][begin:end][kept], row[kept] - start, columns))
        data, row, columns = (np.concatenate(values) for values in zip(*parts))
        return sp.csr_matrix((data, (row, columns)), shape=(stop - start, self.shape[1]))


def _column_blocks(indptr):
    """Ranges of columns with some COLUMN_BLOCK values each."""
    first, n_columns = 0, len(indptr) - 1
    while first < n_columns:
        last = int(np.searchsorted(indptr, indptr[first] + COLUMN_BLOCK, side="right")) - 1
        last = min(max(last, first + 1), n_columns)
        yield first, last
        first = last


def iter_cell_chunks(cells, layer=None, chunk_size=CHUNK_SIZE):
    """Rows of a matrix as CSR chunks; memory does not grow with the cells of an .h5ad file.

    Parameters
    ----------
    cells : anndata.AnnData, str or os.PathLike
        A path is opened backed.
    layer : str, optional
    chunk_size : int
        Cells per chunk.

    Yields
    ------
    scipy.sparse.csr_matrix [up to chunk_size, genes]
        Checked: finite and non-negative.

    Examples
    --------
    >>> import anndata, numpy as np
    >>> adata = anndata.AnnData(np.eye(5, dtype="float32"))
    >>> [chunk.shape for chunk in iter_cell_chunks(adata, chunk_size=2)]
    [(2, 5), (2, 5), (1, 5)]
    """
    opened = not hasattr(cells, "var_names")
    adata = read_cells(cells, layer=layer, backed=True) if opened else cells
    try:
        matrix, _ = matrix_rows(adata, layer)
        for start in range(0, matrix.shape[0], chunk_size):
            chunk = as_csr(matrix[start : start + chunk_size])
            check_values(chunk)
            yield chunk
    finally:
        if opened and adata.isbacked:
            adata.file.close()


def read_gene_names(path):
    """Ordered gene names from a text file (one per line, .txt, .csv, .gz) or the var_names of an .h5ad.

    Raises
    ------
    InputError
        If the file is missing or damaged, or names a gene twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no gene file {path}.")
    if not h5py.is_hdf5(path):
        return read_gene_panel(path)
    adata = read_cells(path, backed=True, check=False)
    names = gene_names_of(adata.var, adata.var_names)
    adata.file.close()
    if len(set(names)) < len(names):
        raise InputError(f"{path} names {len(names) - len(set(names))} gene(s) more than once.")
    return names
