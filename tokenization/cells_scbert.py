"""What the tokenizer takes for cells: AnnData by its attributes, dictionaries, matrices; by rows."""

from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp

from .expression_scbert import InputError, as_csr
from .genes_scbert import gene_names_of

# cells looked at to tell counts from log1p
SAMPLE_SIZE = 1024


def matrix_and_names(cells, gene_panel, gene_names=None, layer=None):
    """The matrix of `cells`, which can be cut by rows, with one name per column.

    Parameters
    ----------
    cells
        AnnData, ``{"X": matrix, "gene_names": [...]}``, sparse matrix or array [cells, genes].
    gene_panel : sequence of str
        Names of the columns where nothing else tells them.
    gene_names : sequence of str [genes], optional
    layer : str, optional

    Raises
    ------
    InputError
        If there are no cells, or not one name per column.
    """
    if isinstance(cells, Mapping):
        cells, gene_names = cells["X"], cells.get("gene_names") if gene_names is None else gene_names
    if hasattr(cells, "var_names"):
        matrix, source = select_matrix(cells, layer)
        names = gene_names_of(source.var, source.var_names) if gene_names is None else list(gene_names)
    else:
        matrix = cells if hasattr(cells, "shape") else np.asarray(cells)
        matrix = matrix.reshape(1, -1) if len(matrix.shape) == 1 else matrix
        names = gene_panel if gene_names is None else list(gene_names)
    if hasattr(matrix, "tocsr"):
        # other sparse layouts cannot be cut by rows; CSR passes through
        matrix = matrix.tocsr()
    if len(matrix.shape) != 2 or matrix.shape[0] == 0:
        raise InputError(f"No cells: the expression matrix has shape {tuple(matrix.shape)}.")
    if matrix.shape[1] != len(names):
        raise InputError(
            f"The matrix has {matrix.shape[1]} columns for {len(names)} gene names; give gene_names with "
            f"one name per column."
        )
    return matrix, names


def select_matrix(adata, layer=None):
    """Matrix of an AnnData, and the object whose `var` names its columns.

    Parameters
    ----------
    adata
        Anything with `X`, `layers`, `raw`, `var` and `var_names`.
    layer : str, optional
        A layer's name, or ``"raw"`` for `adata.raw`.
    """
    if layer is None or layer == "X":
        if adata.X is None:
            raise InputError(
                f"The file holds no matrix X.{other_sources(adata, None) or ' It has no layers.'}"
            )
        return adata.X, adata
    if layer in adata.layers:
        return adata.layers[layer], adata
    if layer == "raw" and getattr(adata, "raw", None) is not None:
        return adata.raw.X, adata.raw
    have = ", ".join(_source_names(adata)) or "none"
    raise InputError(f"There is no layer {layer!r} in the input; it has: {have}.")


def _source_names(cells):
    names = list(getattr(cells, "layers", ()))
    return [*names, "raw"] if getattr(cells, "raw", None) is not None else names


def other_sources(cells, layer):
    """A sentence on the other matrices of an AnnData, for messages."""
    names = [name for name in _source_names(cells) if name != layer]
    return f" The input also has: {', '.join(names)} (--layer NAME)." if names else ""


def sample_rows(matrix, size=SAMPLE_SIZE):
    """Four blocks of rows spread over the matrix: files are often sorted by sample."""
    n = matrix.shape[0]
    if n <= size:
        return as_csr(matrix[:])
    block = size // 4
    starts = np.linspace(0, n - block, 4).astype(int)
    return sp.vstack([as_csr(matrix[start : start + block]) for start in starts], format="csr")


def stack_chunks(chunks, n_columns, dtype):
    """CSR rows of all chunks as one matrix [rows, n_columns]; never two copies of it in memory."""
    data, indices, lengths = np.empty(0, dtype=dtype), np.empty(0, dtype=np.int32), []
    for chunk in chunks:
        place = len(data)
        for array, part in ((data, chunk.data), (indices, chunk.indices)):
            # large arrays grow by remapping their pages, not by a copy as np.concatenate would
            array.resize(place + len(part), refcheck=False)
            array[place:] = part
        lengths.append(np.diff(chunk.indptr))
    lengths = np.concatenate(lengths)
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return sp.csr_matrix((data, indices, indptr), shape=(len(lengths), n_columns))
