"""Which cells are good enough to learn from."""

from dataclasses import dataclass

import numpy as np

from ..tokenization import InputError
from ..tokenization.expression_scbert import as_csr
from .read import CHUNK_SIZE, matrix_rows

MITOCHONDRIAL = "MT-"


@dataclass(frozen=True)
class QualityRules:
    """Which cells and genes of a file are taken.

    Attributes
    ----------
    min_genes : int
        Least number of expressed genes of a cell.
    min_cells : int
        Least number of cells that express a gene; for `corpus_shards`, `choose_cells` does not look at it.
    max_mito_fraction : float or None
        Largest share of mitochondrial counts; None for no limit.
    doublet_key : str or None
        Column of `obs` with a doublet score, or a doublet call (true, or the word "doublet").
    max_doublet_score : float
        Largest score.
    """

    min_genes: int = 200
    min_cells: int = 1
    max_mito_fraction: float | None = None
    doublet_key: str | None = None
    max_doublet_score: float = 0.5


@dataclass
class CellQuality:
    """Measures of every cell; made by `measure_cells`."""

    # expressed genes, int [cells]
    n_genes: np.ndarray
    # sum of the values, [cells]
    total: np.ndarray
    # share of the sum in mitochondrial genes (MT-...), [cells]; None if there are none
    mito_fraction: np.ndarray | None
    # cells expressing each gene, int [genes]
    cells_per_gene: np.ndarray


def measure_cells(adata, layer=None, chunk_size=CHUNK_SIZE, on_chunk=None):
    """The `CellQuality` of an AnnData, in memory or backed, in chunks of cells.

    `on_chunk` is called with every chunk (CSR) in turn, so that a large file need not be read twice.
    """
    matrix, names = matrix_rows(adata, layer)
    mito = np.array([name.startswith(MITOCHONDRIAL) for name in names])
    n_genes, total, mito_total, per_gene = [], [], [], np.zeros(matrix.shape[1], dtype=np.int64)
    for start in range(0, matrix.shape[0], chunk_size):
        chunk = as_csr(matrix[start : start + chunk_size])
        if on_chunk is not None:
            on_chunk(chunk)
        n_genes.append(np.diff(chunk.indptr))
        total.append(np.asarray(chunk.sum(1, dtype=np.float64)).ravel())
        mito_total.append(np.asarray(chunk[:, mito].sum(1, dtype=np.float64)).ravel())
        per_gene += np.bincount(chunk.indices, minlength=matrix.shape[1])
    total = np.concatenate(total)
    share = np.divide(np.concatenate(mito_total), total, out=np.zeros_like(total), where=total > 0)
    return CellQuality(np.concatenate(n_genes), total, share if mito.any() else None, per_gene)


def choose_cells(obs, quality, rules):
    """Cells that pass the `QualityRules`, and how many each rule leaves out.

    Parameters
    ----------
    obs : pandas.DataFrame [cells]
    quality : CellQuality
        Of the same cells.
    rules : QualityRules

    Returns
    -------
    keep : numpy.ndarray of bool [cells]
    report : dict of str to int
        ``few_genes``, ``mitochondrial``, ``doublets``: cells left out, each counted under the first rule that
        applies; ``kept``.

    Raises
    ------
    InputError
        If a rule needs something that the data lack.

    Examples
    --------
    >>> import anndata
    >>> cells = anndata.AnnData(np.eye(3, dtype="float32"))
    >>> keep, report = choose_cells(cells.obs, measure_cells(cells), QualityRules(min_genes=1))
    >>> report
    {'few_genes': 0, 'mitochondrial': 0, 'doublets': 0, 'kept': 3}
    """
    faults = {
        "few_genes": quality.n_genes < rules.min_genes,
        "mitochondrial": _above_mito(quality, rules.max_mito_fraction),
        "doublets": _is_doublet(obs, rules.doublet_key, rules.max_doublet_score),
    }
    keep, report = np.ones(len(obs), dtype=bool), {}
    for name, bad in faults.items():
        report[name] = int((keep & bad).sum())
        keep &= ~bad
    report["kept"] = int(keep.sum())
    return keep, report


def _above_mito(quality, maximum):
    if maximum is None:
        return np.zeros(len(quality.total), dtype=bool)
    if not 0 <= maximum <= 1:
        raise InputError(f"The largest mitochondrial share must be between 0 and 1; found {maximum}.")
    if quality.mito_fraction is None:
        raise InputError(
            f"There are no mitochondrial genes (names that begin with {MITOCHONDRIAL}), so their share cannot "
            f"be limited. Leave out max_mito_fraction (--max-mito-fraction)."
        )
    return quality.mito_fraction > maximum


def _is_doublet(obs, key, maximum):
    if key is None:
        return np.zeros(len(obs), dtype=bool)
    if key not in obs:
        raise InputError(f"There is no column {key!r} in obs; it has: {', '.join(map(str, obs.columns))}.")
    column = obs[key]
    if column.dtype.kind == "f":
        # a cell that was never scored is not taken for a doublet
        return (column > maximum).to_numpy()
    words = column.astype(str).str.strip().str.lower()
    if not set(words) <= {"true", "false", "doublet", "singlet", "1", "0", "nan", "none", ""}:
        raise InputError(
            f"The column {key!r} is neither a score nor a doublet call (true/false, doublet/singlet); it holds "
            f"for example {column.iloc[0]!r}."
        )
    return words.isin(["true", "doublet", "1"]).to_numpy()
