"""Expression values to expression bins: size factor, logarithm, fixed and quantile bins.

Everything works on the non-zero values of a CSR matrix, row by row; nothing here makes a dense
cells x genes array.
"""

import math

import numpy as np
import scipy.sparse as sp

from .errors_scbert import InputError

BINNINGS = {"floor", "quantile"}
INPUT_KINDS = ("auto", "counts", "log1p")

# row sums of expm1 within this share of their median count as "near constant"
ROW_SUM_TOLERANCE = 0.02
# with fewer cells than this, constancy says nothing and the sum itself has to be the target
MIN_ROWS_FOR_CONSTANCY = 5
# natural log1p of any count matrix stays far below this; expm1 of it would overflow
MAX_LOG_VALUE = 50.0


def as_csr(matrix):
    """Rows of any matrix, dense or sparse, as a canonical CSR matrix (sorted, no duplicates, no stored zeros).

    It shares memory with `matrix` where that is canonical CSR already.
    """
    if sp.issparse(matrix):
        csr = sp.csr_matrix(matrix)
    else:
        dense = np.atleast_2d(np.asarray(matrix))
        if dense.ndim != 2 or dense.dtype.kind not in "buif":
            raise InputError(
                f"Expression values must be a numeric matrix of cells x genes; found an array of "
                f"type {dense.dtype} and shape {dense.shape}."
            )
        # scipy has no sparse half precision
        csr = _csr_of_dense(dense.astype(np.float32) if dense.dtype == np.float16 else dense)
    if not csr.has_canonical_format or (csr.data == 0).any():
        # the arrays may be the caller's own, and tidying works in place
        csr = csr.copy() if sp.issparse(matrix) else csr
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr


def _csr_of_dense(dense):
    """As ``csr_matrix(dense)``, which looks for zeros among numbers, in a quarter of its time: among booleans."""
    n_genes = dense.shape[1]
    places = np.flatnonzero(dense != 0)
    indptr = np.searchsorted(places, np.arange(len(dense) + 1) * n_genes)
    return sp.csr_matrix((dense.reshape(-1)[places], places % n_genes, indptr), shape=dense.shape)


def check_values(matrix):
    """Refuse NaN, infinite and negative values, and values that are not numbers, in a sparse matrix or an array."""
    data = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    if data.size == 0:
        return
    if data.dtype.kind not in "buif":
        raise InputError(f"The expression matrix holds values of type {data.dtype}; numbers are needed.")
    # min and max meet every NaN, so the usual case costs two passes without a copy
    low, high = data.min(), data.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(data)).sum())
        raise InputError(
            f"Found {bad} NaN or infinite expression value(s). Expression must be finite: remove those "
            f"cells or genes, or set them to 0, and try again."
        )
    if low < 0:
        bad = int((data < 0).sum())
        raise InputError(
            f"Found {bad} negative expression value(s), the smallest {low:.3g}. The values look z-scored "
            f"or otherwise scaled, which cannot be undone: give raw counts or log1p values instead, for "
            f"example layer='counts' or 'raw' (--layer counts, --layer raw)."
        )


def check_logs(csr):
    """Refuse values said to be natural log1p that are too large for it."""
    check_values(csr)
    if csr.nnz and csr.data.max() > MAX_LOG_VALUE:
        raise InputError(
            f"The values are said to be natural log1p, but the largest is {csr.data.max():.4g}; logarithms of counts "
            f"stay far below {MAX_LOG_VALUE:g}. If they are counts, say input='counts' (--values counts)."
        )


def is_integer_valued(csr):
    """Whether every stored value is a whole number."""
    return not np.issubdtype(csr.dtype, np.inexact) or bool((csr.data == np.rint(csr.data)).all())


def detect_input_kind(csr, target_sum=1e4):
    """Tell raw counts, ``"counts"``, from natural log1p values, ``"log1p"``; an InputError says what neither may be.

    Whole numbers are counts. Fractions whose ``expm1`` row sums are near constant are natural log1p of
    size-normalised counts. Nothing else is guessed. The matrix holds all genes of the file, before any alignment: a
    row sum over a part of them is not constant. A few cells, where constancy cannot be judged, must show `target_sum`.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> detect_input_kind(sp.csr_matrix(np.array([[1.0, 0.0, 3.0]])))
    'counts'
    """
    check_values(csr)
    if is_integer_valued(csr):
        return "counts"
    if log1p_scale(csr, target_sum) is not None:
        return "log1p"
    raise InputError(_unclear_message(csr))


def log1p_scale(csr, target_sum=1e4):
    """The common row sum of ``expm1(values)`` if the rows have one, else None.

    It is `target_sum` itself if the sums agree with it within the tolerance; otherwise their median.
    """
    if csr.nnz == 0 or csr.data.max() > MAX_LOG_VALUE:
        return None
    sums = _row_sums(csr, np.expm1(csr.data, dtype=np.float64))
    if _near(sums, target_sum):
        return float(target_sum)
    median = float(np.median(sums))
    # proportions and other small values have expm1(x) ~ x: their plain sums are as constant
    plain = _row_sums(csr, csr.data.astype(np.float64))
    constant = len(sums) >= MIN_ROWS_FOR_CONSTANCY and _near(sums, median)
    return median if constant and not _near(plain, np.median(plain)) else None


def _near(sums, value):
    return bool(np.mean(np.abs(sums - value) <= ROW_SUM_TOLERANCE * abs(value)) >= 0.95)


def _row_sums(csr, data):
    """Sums of `data` over the rows of `csr`, empty rows left out."""
    rows = np.flatnonzero(np.diff(csr.indptr))
    return np.add.reduceat(data, csr.indptr[rows]) if len(rows) else np.zeros(0)


def _unclear_message(csr):
    plain = _row_sums(csr, csr.data.astype(np.float64))
    found = f"largest value {csr.data.max():.4g}, row sums from {plain.min():.4g} to {plain.max():.4g}"
    if _near(plain, np.median(plain)):
        hint = "They look size-normalised but not logged: if so, say input='counts' (--values counts)."
    else:
        hint = (
            "If they are counts with fractions (from a pseudo-aligner or ambient correction), say "
            "input='counts' (--values counts); if they are natural-log log1p of counts per 10,000, cut to a "
            "part of the genes, say input='log1p' (--values log1p); otherwise give raw counts, for example "
            "layer='counts' (--layer counts)."
        )
    return (
        f"The expression values are neither whole-number counts nor natural log1p values with constant "
        f"row sums ({found}). {hint}"
    )


def normalize_expression(counts, target_sum=1e4, log_base=2.0, modalities=None, dtype=np.float32):
    """Size factor and logarithm: ``log(1 + count * target_sum / row_sum)`` to base `log_base`, CSR [cells, genes].

    Counts are non-negative and aligned to the gene panel already: the size factor is taken after it; with `modalities`
    [genes], within each modality of a cell. float64 is for bins that have to be exact at their edges.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> normalize_expression(sp.csr_matrix(np.array([[1, 0, 1]])), target_sum=6).toarray()
    array([[2., 0., 2.]], dtype=float32)
    """
    values = counts.data.astype(np.float64)
    lengths = np.diff(counts.indptr)
    if modalities is None:
        totals = np.repeat(with_data(counts, values) @ np.ones(counts.shape[1]), lengths)
    else:
        n_modalities = int(np.max(modalities, initial=0)) + 1
        groups = np.repeat(np.arange(counts.shape[0]) * n_modalities, lengths)
        groups += np.asarray(modalities)[counts.indices]
        totals = np.bincount(groups, weights=values)[groups]
    # multiplied before divided: count * target == edge * total then gives the edge without rounding
    values *= target_sum
    values /= totals
    return with_data(counts, _log_one_plus(values, log_base).astype(dtype))


def _log_one_plus(values, log_base):
    """log(1 + values) in place; base 2 through log2, which is exact at powers of two."""
    if log_base == 2.0:
        values += 1.0
        return np.log2(values, out=values)
    np.log1p(values, out=values)
    values /= math.log(log_base)
    return values


def change_log_base(csr, log_base=2.0):
    """Natural log1p values to base `log_base`: a division by ``ln(log_base)``, kept in float32."""
    values = csr.data.astype(np.float64)
    values /= math.log(log_base)
    return with_data(csr, values.astype(np.float32))


def bin_floor(csr, n_bins, bin_width=1.0):
    """Fixed bins: ``floor(value / bin_width)``, at most `n_bins`.

    A value within four units of rounding of an edge counts as on it, so that 2.9999998 in float32, which
    is what log2(1 + 7) becomes on its way through a file, falls into bin 3. Of float64 values computed
    from whole counts only those exactly on an edge are that near (two different ones differ by at least
    1 / (row sum)), so bins from counts are exact.

    From normalised values, CSR [cells, genes] of float32 or float64, to bins 1..n_bins of int8 (int16 above 126
    bins); bin 0 is not stored. Widths are on the log scale; 1 is scBERT's.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> bin_floor(sp.csr_matrix(np.array([[0.5, 2.0, 9.7]])), n_bins=5).toarray()
    array([[0, 2, 5]], dtype=int8)
    """
    slack = 1.0 + 4.0 * float(np.finfo(csr.dtype).eps)
    bins = csr.data.astype(np.float64)
    bins *= slack / bin_width
    np.minimum(bins, n_bins, out=bins)
    # values are non-negative, so the cast truncates as floor does
    bins = bins.astype(bin_dtype(n_bins))
    return keep_values(with_data(csr, bins), bins > 0)


def floor_values(n_bins, bin_width=1.0, log_base=2.0):
    """Expression, of the target sum in a cell, that fixed bins stand for: the middle of each on the log scale, float32.

    Examples
    --------
    >>> floor_values(2).round(2)
    array([0.  , 1.83, 4.66], dtype=float32)
    """
    values = log_base ** ((np.arange(n_bins + 1) + 0.5) * bin_width) - 1
    values[0] = 0
    return values.astype(np.float32)


def bin_quantile(csr, n_bins):
    """Quantile bins of each cell's own non-zero values.

    The edges are the quantiles 0, 1/(n_bins - 1), ..., 1 of a row's non-zero values; the bin of a value is
    the number of edges not above it, from 1 (the smallest) to n_bins (the largest). This is scGPT's
    binning without its random spread of ties; scGPT's count of 51 includes the bin of the zeros, so it is
    ``n_bins=50`` here.

    Values may be of any monotone scale; bins 1..n_bins are CSR of int8 or int16.
    """
    bins = np.empty(csr.nnz, dtype=bin_dtype(n_bins))
    for start, stop in zip(csr.indptr[:-1], csr.indptr[1:]):
        if stop > start:
            values = csr.data[start:stop]
            bins[start:stop] = np.searchsorted(_quantile_edges(values, n_bins), values, side="right")
    return keep_values(with_data(csr, bins), bins > 0)


def _quantile_edges(values, n_bins):
    """Quantiles of `values` by linear interpolation at whole-number positions of n_bins - 1 steps."""
    ordered = np.sort(values)
    if n_bins == 1:
        return ordered[:1]
    # whole-number arithmetic: an edge that falls on a value is that value, to the bit
    below, remainder = np.divmod(np.arange(n_bins, dtype=np.int64) * (len(ordered) - 1), n_bins - 1)
    above = np.minimum(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (remainder / (n_bins - 1))


def bin_dtype(n_bins):
    """Smallest integer type holding the bins and the mask id."""
    return np.int8 if n_bins + 1 <= np.iinfo(np.int8).max else np.int16


def with_data(csr, data):
    """A matrix of the same places with other values."""
    return sp.csr_matrix((data, csr.indices, csr.indptr), shape=csr.shape)


def keep_values(csr, kept):
    """A matrix with those of its stored values for which `kept` [stored values] is true."""
    if kept.all():
        return csr
    lost = np.flatnonzero(~kept)
    indptr = csr.indptr - np.searchsorted(lost, csr.indptr).astype(csr.indptr.dtype)
    return sp.csr_matrix((csr.data[kept], csr.indices[kept], indptr), shape=csr.shape)


def expm1(csr, dtype=np.float64):
    """Natural log1p values back on a linear scale."""
    return with_data(csr, np.expm1(csr.data, dtype=dtype))


def check_options(options, gene_panel, modalities):
    """Refuse options of a tokenizer that cannot be."""
    problems = []
    if options["binning"] not in BINNINGS:
        problems.append(f"binning must be one of {sorted(BINNINGS)}, found {options['binning']!r}")
    if not 1 <= options["n_bins"] <= 30_000:
        problems.append(f"n_bins must be from 1 to 30,000, found {options['n_bins']}")
    for name, low in (("target_sum", 0), ("bin_width", 0), ("log_base", 1)):
        if not options[name] > low:
            problems.append(f"{name} must be above {low}, found {options[name]}")
    if options["max_length"] is not None:
        if options["keep_zeros"] and options["max_length"] < len(gene_panel) + 1:
            problems.append("max_length cuts cells only with keep_zeros=False; leave it out")
        if options["max_length"] < 2:
            problems.append("max_length must be at least 2: one gene and the trailing token")
    if modalities is not None and (len(modalities) != len(gene_panel) or min(modalities) < 0):
        problems.append("feature_modalities must hold one id from 0 on for every gene of the panel")
    if problems:
        raise InputError("ScBertTokenizer: " + "; ".join(problems) + ".")
