"""Which cells are good enough to learn from."""

from dataclasses import dataclass

import numpy as np

from ..tokenization import InputError
from ..tokenization.expression_scbert import as_csr
from .read import CHUNK_SIZE, matrix_rows

MITOCHONDRIAL = "MT-"
# a cell with a higher doublet score is left out
MAX_DOUBLET_SCORE = 0.5


@dataclass(frozen=True)
class QualityRules:
    """Which cells and genes of a file are taken."""

    # least number of expressed genes of a cell
    min_genes: int = 200
    # least number of cells that express a gene; for `corpus_shards`, `choose_cells` does not look at it
    min_cells: int = 1
    # largest share of mitochondrial counts; None for no limit
    max_mito_fraction: float | None = None
    # column of obs with a doublet score, or a doublet call (true, or the word "doublet")
    doublet_key: str | None = None


@dataclass
class CellQuality:
    """Measures of every cell; made by `measure_cells`."""

    # expressed genes, int [cells]
    n_genes: np.ndarray
    # share of the counts in mitochondrial genes (MT-...), [cells]; None if there are none
    mito_fraction: np.ndarray | None
    # cells expressing each gene, int [genes]
    cells_per_gene: np.ndarray


def measure_cells(adata, layer=None, on_chunk=lambda chunk: None, log1p=False):
    """The `CellQuality` of an AnnData, in memory or backed, in chunks of cells; its values are counts or their `log1p`.

    `on_chunk` is called with every chunk (CSR) in turn, so that a large file need not be read twice.
    """
    matrix, names = matrix_rows(adata, layer)
    mito = np.array([name.startswith(MITOCHONDRIAL) for name in names])
    n_genes, share, per_gene = [], [], np.zeros(matrix.shape[1], dtype=np.int64)
    for start in range(0, matrix.shape[0], CHUNK_SIZE):
        chunk = as_csr(matrix[start : start + CHUNK_SIZE])
        on_chunk(chunk)
        n_genes.append(np.diff(chunk.indptr))
        counts = chunk.expm1() if log1p else chunk
        of_mito, total = (np.asarray(x.sum(1, dtype=np.float64)).ravel() for x in (counts[:, mito], counts))
        share.append(np.divide(of_mito, total, out=np.zeros_like(total), where=total > 0))
        per_gene += np.bincount(chunk.indices, minlength=matrix.shape[1])
    return CellQuality(np.concatenate(n_genes), np.concatenate(share) if mito.any() else None, per_gene)


def choose_cells(obs, quality, rules):
    """Cells that pass the `QualityRules`, bool [cells], and how many each rule leaves out.

    `obs` and `quality` are of the same cells. The report counts ``few_genes``, ``mitochondrial`` and ``doublets``, each
    cell under the first rule that applies, and those ``kept``. A rule that needs something the data lack is refused.
    """
    faults = {
        "few_genes": quality.n_genes < rules.min_genes,
        "mitochondrial": _above_mito(quality, rules.max_mito_fraction),
        "doublets": _is_doublet(obs, rules.doublet_key),
    }
    keep, report = np.ones(len(obs), dtype=bool), {}
    for name, bad in faults.items():
        report[name] = int((keep & bad).sum())
        keep &= ~bad
    report["kept"] = int(keep.sum())
    return keep, report


def _above_mito(quality, maximum):
    if maximum is None:
        return np.zeros(len(quality.n_genes), dtype=bool)
    if not 0 <= maximum <= 1:
        raise InputError(f"The largest mitochondrial share must be between 0 and 1; found {maximum}.")
    if quality.mito_fraction is None:
        raise InputError(
            f"There are no mitochondrial genes (names that begin with {MITOCHONDRIAL}), so their share cannot "
            f"be limited. Leave out max_mito_fraction (--max-mito-fraction)."
        )
    return quality.mito_fraction > maximum


def _is_doublet(obs, key):
    if key is None:
        return np.zeros(len(obs), dtype=bool)
    if key not in obs:
        raise InputError(f"There is no column {key!r} in obs; it has: {', '.join(map(str, obs.columns))}.")
    column = obs[key]
    if column.dtype.kind == "f":
        # a cell that was never scored is not taken for a doublet
        return column.to_numpy(np.float64, na_value=np.nan) > MAX_DOUBLET_SCORE
    words = column.astype(str).str.strip().str.lower()
    if not set(words) <= {"true", "false", "doublet", "singlet", "1", "0", "nan", "none", "<na>", ""}:
        raise InputError(
            f"The column {key!r} is neither a score nor a doublet call (true/false, doublet/singlet); it holds "
            f"for example {column.iloc[0]!r}."
        )
    return words.isin(["true", "doublet", "1"]).to_numpy()
