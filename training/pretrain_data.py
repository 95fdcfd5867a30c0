"""Cells of a pretraining run: read, checked, binned and split."""

import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..data.cell_dataset import CellDataset
from ..data.modalities import feature_modalities
from ..data.multiomics import common_build
from ..data.read import matrix_rows, read_cells, read_gene_names
from ..tokenization import InputError, ScBertTokenizer
from ..tokenization.genes_scbert import MINIMUM_OVERLAP
from .pretrain_arguments import PretrainDataArguments
from .run_gene2vec import corpus_files

logger = logging.getLogger(__name__)

# scBERT's rule for the full panel; a small one would lose its cells
MIN_GENES = 200
PANEL_WITH_MIN_GENES = 5000


@dataclass
class PretrainData:
    """
    Everything a pretraining run learns from.

    Attributes
    ----------
    tokenizer
        The base's, or one over the chosen panel.
    train, validation
        Map-style data sets of items with a sparse ``"row"``, such as `CellDataset`.
    bin_counts
        How often each bin stands at each gene in the training cells, [genes, vocabulary] int64.
    report
        Cells and files taken and left out.
    """

    tokenizer: ScBertTokenizer
    train: Any
    validation: Any
    bin_counts: np.ndarray
    report: dict[str, Any]

    def fingerprint(self) -> int:
        """A checksum of panel, splits and training bins: a resumed run must have the same."""
        checksum = zlib.crc32("\n".join(self.tokenizer.gene_panel).encode())
        sizes = np.array([len(self.train), len(self.validation)], dtype=np.int64)
        return zlib.crc32(self.bin_counts.tobytes(), zlib.crc32(sizes.tobytes(), checksum))


def load_pretrain_data(
    data: PretrainDataArguments, tokenizer: ScBertTokenizer | dict[str, Any], seed: int
) -> PretrainData:
    """
    Read the corpus, bin its cells and put some aside for validation.

    Parameters
    ----------
    data
        Files and fractions.
    tokenizer
        The base's tokenizer, or options for a new one over the panel of the run.
    seed
        Decides which cells validate.

    Raises
    ------
    InputError
        If no file of the corpus can be used, or too few cells are left.
    """
    files = corpus_files(data.corpus)
    # a panel of all the corpus's genes is wider than each of its files
    overlap = 0.0 if isinstance(tokenizer, dict) and not data.genes else MINIMUM_OVERLAP
    if isinstance(tokenizer, dict):
        tokenizer = _new_tokenizer(tokenizer, files, data)
    bins, report = _bin_files(files, tokenizer, data, overlap)
    n_validation = max(1, round(data.validation_fraction * bins.shape[0]))
    if bins.shape[0] <= n_validation:
        raise InputError(
            f"{bins.shape[0]} cell(s) are left to learn from and to validate on; more are needed."
        )
    order = np.random.default_rng(seed).permutation(bins.shape[0])
    validation, train = np.sort(order[:n_validation]), np.sort(order[n_validation:])
    counts = count_bins(bins[train], tokenizer.vocab_size)
    report["cells"] = {"train": len(train), "validation": len(validation)}
    cells = CellDataset(bins)
    return PretrainData(tokenizer, cells.subset(train), cells.subset(validation), counts, report)


def count_bins(bins: sp.csr_matrix, vocab_size: int) -> np.ndarray:
    """
    How often each expression id stands at each gene.

    Parameters
    ----------
    bins
        [cells, genes], bin 0 not stored.
    vocab_size
        Number of expression ids.

    Returns
    -------
    numpy.ndarray
        [genes, vocab_size] int64; zeros are not counted (column 0 is 0), as they are never asked for.
    """
    n_genes = bins.shape[1]
    flat = bins.indices.astype(np.int64) * vocab_size + bins.data
    return np.bincount(flat, minlength=n_genes * vocab_size).reshape(n_genes, vocab_size)


def least_genes(min_genes: int | None, tokenizer: ScBertTokenizer) -> int:
    """Expressed genes a cell needs: what was asked for, or scBERT's rule where the panel is large."""
    if min_genes is not None:
        return min_genes
    return MIN_GENES if len(tokenizer.gene_panel) >= PANEL_WITH_MIN_GENES else 0


def _new_tokenizer(
    options: dict[str, Any], files: list[Path], data: PretrainDataArguments
) -> ScBertTokenizer:
    """A tokenizer over the panel file, or over the genes some cell of the corpus expresses."""
    modalities = {}
    panel = read_gene_names(data.genes) if data.genes else _expressed_genes(files, data, modalities)
    if any(modalities.values()):
        options = {**options, "feature_modalities": [modalities[name] for name in panel]}
        options["genome_build"] = common_build(files)
    if not data.genes:
        logger.info("The panel is the %d genes the corpus expresses; --genes FILE gives another.", len(panel))
    try:
        return ScBertTokenizer(gene_panel=panel, **options)
    except TypeError as error:
        raise InputError(f"The recipe's tokenizer options do not work: {error}.") from error


def _expressed_genes(files: list[Path], data: PretrainDataArguments, modalities: dict[str, int]) -> list[str]:
    """Genes with a count anywhere, in order of appearance; ``modalities`` is filled by name."""
    found: dict[str, None] = {}
    for path in files:
        try:
            adata = read_cells(path, layer=data.layer)
            matrix, names = matrix_rows(adata, data.layer)
        except InputError:
            # said, once, when the file is binned
            continue
        seen = np.asarray((matrix != 0).sum(axis=0)).ravel() > 0
        found.update(dict.fromkeys(name for name, is_seen in zip(names, seen) if is_seen))
        ids = feature_modalities(adata.var) if len(names) == adata.n_vars else None
        modalities.update(zip(names, [0] * len(names) if ids is None else ids.tolist()))
    if not found:
        raise InputError(f"No gene is expressed in any cell of {data.corpus}.")
    return list(found)


def _bin_files(
    files: list[Path], tokenizer: ScBertTokenizer, data: PretrainDataArguments, overlap: float
) -> tuple[sp.csr_matrix, dict[str, Any]]:
    """Bins of all usable cells, and a report by file; files that cannot be used are named and left out."""
    minimum = least_genes(data.min_genes, tokenizer)
    parts, report = [], {"files": {}, "left_out": {}, "min_genes": minimum}
    for path in files:
        try:
            adata = read_cells(path, layer=data.layer)
            tokenizer.align(adata, layer=data.layer).check(overlap, force=data.force)
            bins = tokenizer.bin_cells(adata, input=data.input, layer=data.layer)
        except InputError as problem:
            if len(files) == 1:
                raise
            logger.warning("%s is left out: %s", path.name, problem)
            report["left_out"][path.name] = str(problem)
            continue
        # a cell with nothing to ask for teaches nothing
        kept = bins[np.flatnonzero(np.diff(bins.indptr) >= max(1, minimum))]
        report["files"][path.name] = {"cells": kept.shape[0], "poor_cells": bins.shape[0] - kept.shape[0]}
        parts.append(kept)
    if not sum(part.shape[0] for part in parts):
        raise InputError(
            f"No cell of {data.corpus} can be used: {len(report['left_out'])} file(s) were left out, and cells "
            f"that express fewer than {minimum} genes of the panel (--min-genes)."
        )
    return sp.vstack(parts, format="csr"), report
