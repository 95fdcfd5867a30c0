"""Cells by rows, at both ends of the tokenizer.

What it takes for cells: AnnData and data frames by their attributes, dictionaries, matrices. What it makes of their
expression bins: sequences of every gene, or of the expressed ones, padded.
"""

import os
import zlib
from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp

from .errors_scbert import InputError
from .expression_scbert import INPUT_KINDS, as_csr, check_logs, detect_input_kind, keep_values, log1p_scale
from .genes_scbert import align_genes, gene_names_of

# cells looked at to tell counts from log1p
SAMPLE_SIZE = 1024
# as 10x names them in var["feature_types"]; the place of a type is its modality id
FEATURE_TYPES = ("Gene Expression", "Peaks", "Antibody Capture")


def matrix_and_names(cells, gene_panel, gene_names=None, layer=None):
    """The matrix of `cells`, which can be cut by rows, with one name per column.

    The arguments are those of calling the tokenizer; there may also be one cell alone, an array or Series [genes].
    Names are those of the panel where nothing else tells them.
    """
    if isinstance(cells, (str, os.PathLike)):
        raise TypeError(
            f"The tokenizer takes cells, not the path {os.fspath(cells)!r}. Read the file first, for example "
            f"with anndata.read_h5ad, and pass the AnnData."
        )
    if isinstance(cells, Mapping) and not sp.issparse(cells):
        cells, gene_names = cells["X"], cells.get("gene_names") if gene_names is None else gene_names
    if hasattr(cells, "var_names"):
        matrix, source = select_matrix(cells, layer)
        names = gene_names_of(source.var, source.var_names, gene_panel)
    elif hasattr(cells, "to_numpy") and hasattr(cells, "index"):
        matrix, names = _frame_and_names(cells, gene_panel)
    else:
        matrix = cells if hasattr(cells, "shape") else np.asarray(cells)
        matrix = matrix.reshape(1, -1) if len(matrix.shape) == 1 else matrix
        names = gene_panel
    names = names if gene_names is None else list(gene_names)
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


def _frame_and_names(frame, gene_panel):
    """Matrix and columns of a DataFrame; of a Series, as one cell."""
    frame = frame if hasattr(frame, "columns") else frame.to_frame().T
    names, panel = [str(name) for name in frame.columns], set(gene_panel)
    if panel.isdisjoint(names) and not panel.isdisjoint(map(str, frame.index)):
        raise InputError(
            "The genes are the rows of this DataFrame; they must be its columns. Pass its transpose (.T)."
        )
    text = [name for name, kind in zip(names, frame.dtypes) if getattr(kind, "kind", "O") not in "buif"]
    if text:
        raise InputError(
            f"Columns of the DataFrame do not hold numbers (first: {', '.join(text[:3])}). Leave out all that are not "
            f"genes, such as labels."
        )
    # the accessor is there only where every column is sparse
    matrix = frame.sparse.to_coo() if hasattr(frame, "sparse") else frame.to_numpy()
    if matrix.dtype.kind not in "buif":
        # numbers of pandas' own kinds, or of kinds that numpy has no common one for
        matrix = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return matrix, names


def select_matrix(adata, layer=None):
    """Matrix of an AnnData, and the object whose `var` names its columns.

    It may be anything with `X`, `layers`, `raw`, `var` and `var_names`; the layer ``"raw"`` is `adata.raw`. A matrix
    that is not there, or does not have two dimensions, is refused.
    """
    if layer is None or layer == "X":
        if adata.X is None:
            raise InputError(
                f"There is no matrix X.{other_sources(adata, None) or ' There are no layers either.'}"
            )
        matrix, source = adata.X, adata
    elif layer in list(adata.layers):
        matrix, source = adata.layers[layer], adata
    elif layer == "raw" and getattr(adata, "raw", None) is not None:
        matrix, source = adata.raw.X, adata.raw
    else:
        have = ", ".join(_source_names(adata)) or "none"
        raise InputError(f"There is no layer {layer!r} in the input; it has: {have}.")
    check_shape(matrix)
    return matrix, source


def check_shape(matrix):
    """Refuse an expression matrix that is not cells x genes."""
    if len(matrix.shape) != 2:
        raise InputError(
            f"The expression matrix has shape {tuple(matrix.shape)}; two dimensions, cells x genes, are needed. Store "
            f"a single gene as one column, X.reshape(-1, 1), and a single cell as one row, X.reshape(1, -1)."
        )


def _source_names(cells):
    names = list(getattr(cells, "layers", ()))
    return [*names, "raw"] if getattr(cells, "raw", None) is not None else names


def other_sources(cells, layer):
    """A sentence on the other matrices of an AnnData, for messages."""
    names = [name for name in _source_names(cells) if name != layer]
    return f" The input also has: {', '.join(names)} (layer=NAME, or --layer NAME)." if names else ""


def feature_modalities(var):
    """Modality id of every feature, int64 [features], or None where `var` names no modality but gene expression."""
    if "feature_types" not in var:
        return None
    ids = var["feature_types"].astype(str).map({kind: i for i, kind in enumerate(FEATURE_TYPES)})
    return ids.to_numpy(dtype=np.int64) if ids.notna().all() and ids.max() > 0 else None


def raw_hint(cells, gene_panel, layer=None):
    """For `GeneAlignment.check`: a sentence that names ``.raw`` where it has more genes of the panel than `layer`.

    Files often keep highly variable genes in X and all of them in `.raw`.
    """
    raw = getattr(cells, "raw", None)
    if raw is None or layer == "raw":
        return ""
    used, all_genes = (
        align_genes(gene_names_of(each.var, each.var_names, gene_panel), gene_panel).n_matched
        for each in (cells, raw)
    )
    if all_genes <= used:
        return ""
    return f"The genes may have been cut to a subset: .raw holds {all_genes:,} of them (layer='raw', or --layer raw)."


def sample_rows(matrix):
    """Four blocks of rows spread over the matrix: files are often sorted by sample."""
    n = matrix.shape[0]
    if n <= SAMPLE_SIZE:
        return as_csr(matrix[:])
    block = SAMPLE_SIZE // 4
    starts = np.linspace(0, n - block, 4).astype(int)
    return sp.vstack([as_csr(matrix[start : start + block]) for start in starts], format="csr")


def resolve_input(matrix, input="auto", target_sum=1e4, hint=""):
    """What kind of values a matrix of cells x genes holds, ``"counts"`` or ``"log1p"``, from a sample of its rows.

    `input` is what it is said to hold, `target_sum` what counts were probably brought to before their logarithm, and
    `hint` what an error ends with, such as `other_sources`. The second answer is the row sum of log1p values before
    their logarithm, or None if they share none: then not all genes are there.
    """
    if input not in INPUT_KINDS:
        raise InputError(f"input must be one of {', '.join(INPUT_KINDS)}; found {input!r}.")
    if input == "counts":
        return "counts", None
    sample = sample_rows(matrix)
    if input == "log1p":
        check_logs(sample)
    try:
        kind = detect_input_kind(sample, target_sum) if input == "auto" else input
    except InputError as error:
        raise InputError(f"{error}{hint}") from None
    return kind, log1p_scale(sample, target_sum) if kind == "log1p" else None


def take_rows(matrix, start, stop):
    """Rows of a matrix; those of a CSR matrix share its memory."""
    if not sp.issparse(matrix):
        return matrix[start:stop]
    indptr = matrix.indptr[start : stop + 1]
    values = slice(indptr[0], indptr[-1])
    shape = (len(indptr) - 1, matrix.shape[1])
    return sp.csr_matrix((matrix.data[values], matrix.indices[values], indptr - indptr[0]), shape=shape)


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


def encode_every_gene(bins):
    """All genes of the panel in order, then the trailing token: ``input_ids``, int64 [cells, panel + 1]."""
    input_ids = np.zeros((bins.shape[0], bins.shape[1] + 1), dtype=np.int64)
    input_ids[:, :-1] = bins.toarray()
    return {"input_ids": input_ids}


def encode_expressed(bins, width=None):
    """Expressed genes of each cell in panel order, the trailing token, then pads, to a length of `width` at least.

    ``input_ids``, ``gene_ids`` and ``attention_mask`` are int64 [cells, length]; pads and the trailing token have id 0
    and the gene id ``panel``.
    """
    lengths = np.diff(bins.indptr)[:, None]
    places = np.arange(max(int(lengths.max(initial=0)) + 1, width or 0))
    expressed = places < lengths
    input_ids = np.zeros(expressed.shape, dtype=np.int64)
    gene_ids = np.full(expressed.shape, bins.shape[1], dtype=np.int64)
    input_ids[expressed] = bins.data
    gene_ids[expressed] = bins.indices
    return {
        "input_ids": input_ids,
        "gene_ids": gene_ids,
        "attention_mask": (places <= lengths).astype(np.int64),
    }


def subsample(bins, max_length, seed=0):
    """Rows cut to ``max_length - 1`` random genes, in panel order: the trailing token needs a place too.

    The subset depends on the cell and `seed` alone.
    """
    if max_length is None or np.diff(bins.indptr).max(initial=0) < max_length:
        return bins
    kept = np.ones(bins.nnz, dtype=bool)
    for start, stop in zip(bins.indptr[:-1], bins.indptr[1:]):
        excess = stop - start - (max_length - 1)
        if excess > 0:
            # a generator of the cell itself: its subset is the same in any batch and any order
            content = zlib.crc32(bins.indices[start:stop].astype(np.int32).tobytes())
            content = zlib.crc32(bins.data[start:stop].astype(np.int16).tobytes(), content)
            rng = np.random.default_rng([seed, content])
            kept[start + rng.choice(stop - start, excess, replace=False)] = False
    return keep_values(bins, kept)
