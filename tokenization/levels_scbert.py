"""Genes that a file lacks: what was not measured is no sign that it is not there.

A tokenizer may know the level of every gene, its mean bin in the cells that a model learnt from. Where a gene of the
panel is not in a file, cells are given its level in the place of 0, and the size factor leaves the room that the counts
of such genes would have taken. Where less than half of the genes are there, levels count less: they are those of the
cells learnt from, and a cell of another kind must not be made like them by what was not measured.
"""

import numpy as np
import scipy.sparse as sp

from .errors_scbert import InputError
from .genes_scbert import open_text


def read_gene_levels(path):
    """Read a level for every gene of a panel, one number per line; None of None."""
    if path is None:
        return None
    try:
        with open_text(path) as handle:
            return [float(line) for line in handle]
    except ValueError as error:
        raise InputError(f"{path} must hold one number per line: {error}.") from error


def write_gene_levels(path, levels):
    """Write the level of every gene, one per line."""
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(f"{level:.3g}\n" for level in levels)


def check_gene_levels(levels, tokenizer):
    """Levels as float64 [genes], refused if they are not a bin for every gene, or the bins of another kind."""
    if tokenizer.binning != "floor" or tokenizer.feature_modalities is not None:
        raise InputError("gene_levels need binning='floor' and features of one modality.")
    levels, n_genes = np.asarray(levels, dtype=np.float64), len(tokenizer.gene_panel)
    if levels.shape != (n_genes,) or not ((levels >= 0) & (levels <= tokenizer.n_bins)).all():
        raise InputError(
            f"gene_levels must hold a number from 0 to {tokenizer.n_bins} for each of the panel's {n_genes} genes."
        )
    return levels


def trust(absent, n_genes):
    """What levels count: 1 down to half of the genes, then twice the share of genes that are there."""
    return min(1.0, 2 * (1 - len(absent) / n_genes))


def measured_share(levels, absent, log_base, bin_width):
    """Share of a cell's counts that genes other than the absent ones have, as far as levels are trusted.

    Parameters
    ----------
    levels : numpy.ndarray, float64 [genes]
    absent : numpy.ndarray, int
        Panel indices.
    log_base, bin_width : float
        Of the bins.

    Examples
    --------
    >>> round(float(measured_share(np.array([1.0, 2.0, 0.0]), np.array([0]), 2.0, 1.0)), 2)
    0.75
    """
    counts = log_base ** (levels * bin_width) - 1
    missing = counts[absent].sum()
    # where all that the model knows is missing nothing can be said
    return (1 - missing / counts.sum()) ** trust(absent, len(levels)) if missing < counts.sum() else 1.0


def fill_absent(bins, absent, levels):
    """Every cell's bins of the absent genes, which are 0, become their levels, rounded; empty cells stay empty.

    Levels are lower where they are trusted less.

    Parameters
    ----------
    bins : scipy.sparse.csr_matrix [cells, panel]
    absent : numpy.ndarray, int
        Panel indices, ascending.
    levels : numpy.ndarray, float64 [genes]

    Returns
    -------
    scipy.sparse.csr_matrix [cells, panel]

    Examples
    --------
    >>> bins = sp.csr_matrix(np.array([[3, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=np.int8))
    >>> fill_absent(bins, np.array([1, 2]), np.array([0.2, 1.8, 0.3, 1.0])).toarray()
    array([[3, 2, 0, 1],
           [1, 2, 0, 0],
           [0, 0, 0, 0]], dtype=int8)
    """
    if not len(absent):
        return bins
    values = np.rint(levels[absent] * trust(absent, len(levels))).astype(bins.dtype)
    absent, values = absent[values > 0], values[values > 0]
    expressed = np.diff(bins.indptr) > 0
    n_cells, starts = expressed.sum(), np.append(0, np.cumsum(expressed)) * len(absent)
    filled = sp.csr_matrix((np.tile(values, n_cells), np.tile(absent, n_cells), starts), shape=bins.shape)
    return bins + filled
