"""
Cells to be annotated or embedded: opened, compared with the model's genes, binned in chunks.

What a command adds to them, ``{"obs": ..., "obsm": ..., "uns": ...}``, is kept where they are and written with them;
columns of obs that are ``"stale"`` are taken away.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from tqdm import tqdm

from ..data.disk_matrix import DiskMatrix
from ..data.paths import atomic_path
from ..data.read import CHUNK_SIZE, closing, matrix_rows
from ..data.read_backed import BackedCells, open_cells
from ..data.read_gene_table import load_gene_table, shipped_gene_table
from ..data.write_h5ad import atomic_copy_h5ad, atomic_write_h5ad
from ..tokenization import GeneAlignment, ScBertTokenizer, align_genes, map_genes
from ..tokenization.cells_scbert import raw_hint
from ..tokenization.genes_scbert import looks_like_ensembl
from ..trained_model.model_folder import versions
from ..trained_model.prediction import LoadedModel

logger = logging.getLogger(__name__)

# bins kept between the checking pass and the model's; above it the file is read twice instead
KEPT_BYTES = 32 << 20


def opened(
    query: str | Path, layer: str | None = None, any_matrix: bool = False
) -> AbstractContextManager[AnnData | BackedCells]:
    """The cells of a file, as `open_cells` has them; closed at the end."""
    return closing(open_cells(query, layer, any_matrix))


class BinnedQuery:
    """
    The cells of an AnnData as expression bins of a model's panel, chunk by chunk.

    Every value is checked before the first chunk is handed out: a NaN in the last cell is told at once, not after
    hours of computing. The options are those of `annotate_file`. `alignment` says how the genes match, `n_empty` how
    many of the `n_cells` express no gene of the panel.
    """

    def __init__(
        self,
        adata: AnnData | BackedCells,
        tokenizer: ScBertTokenizer,
        layer: str | None = None,
        input: str = "auto",
        force: bool = False,
        progress: bool = True,
        gene_table: str | Path | None = None,
        genes_report: str | Path | None = None,
    ):
        self._tokenizer, self.layer, self.input, self._backed = tokenizer, layer, input, adata.isbacked
        self._matrix, names = matrix_rows(adata, layer, tokenizer.gene_panel)
        names = name_genes(names, tokenizer.gene_panel, gene_table, genes_report)
        self.n_cells = adata.n_obs
        self.alignment = align_genes(names, tokenizer.gene_panel)
        self.alignment.hint = raw_hint(adata, tokenizer.gene_panel, layer)
        self.alignment.check(force=force)
        forced = force and self.alignment.overlap < 0.3
        logger.log(logging.WARNING if forced else logging.INFO, overlap_report(self.alignment))
        self._kept: list[sp.csr_matrix] | None = []
        self.n_empty, size = 0, 0
        with progress_bar(self.n_cells, "Reading", progress) as bar:
            for bins in self._bin():
                self.n_empty += int((np.diff(bins.indptr) == 0).sum())
                size += bins.data.nbytes + bins.indices.nbytes + bins.indptr.nbytes
                if size > KEPT_BYTES:
                    self._kept = None
                if self._kept is not None:
                    self._kept.append(bins)
                bar.update(bins.shape[0])

    def _bin(self) -> Iterator[sp.csr_matrix]:
        options = {"alignment": self.alignment, "input": self.input, "chunk_size": CHUNK_SIZE}
        return self._tokenizer.iter_bins({"X": self._matrix}, **options)

    def chunks(self) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Row of the first cell, and bins [up to 4096 cells, panel], of every chunk in order."""
        start = 0
        for bins in self._bin() if self._kept is None else self._kept:
            yield start, bins
            start += bins.shape[0]

    def all_bins(self) -> sp.csr_matrix:
        """Bins of all cells at once, [cells, panel]."""
        return sp.vstack([bins for _, bins in self.chunks()], format="csr")

    def new_rows(self, n_columns: int, output: str | Path | None) -> np.ndarray | DiskMatrix:
        """
        Zeros, float32 [cells, columns], for the results of all cells.

        They stand on disk if that is where the cells are and the results are for a file, the `output`.
        """
        shape = (self.n_cells, n_columns)
        if self._backed and output is not None:
            return DiskMatrix(shape, output)
        return np.zeros(shape, dtype=np.float32)


def name_genes(
    gene_names: Sequence[str],
    gene_panel: Sequence[str],
    gene_table: str | Path | None = None,
    report: str | Path | None = None,
) -> list[str]:
    """
    Names of the query's genes in the model's words, one per column; `gene_table` and `report` as in `annotate_file`.

    Without a table names are matched exactly; only a file that names all its genes by Ensembl ids is mapped by the
    table that ships.
    """
    table, source = None, "the gene table"
    if gene_table is not None:
        table = load_gene_table(gene_table)
    elif looks_like_ensembl(gene_names) and not looks_like_ensembl(gene_panel):
        table, source = shipped_gene_table(), "the table of Ensembl ids that ships"
    if table is None and report is None:
        return list(gene_names)
    mapping = map_genes(gene_names, gene_panel, table)
    if report is not None:
        # consent to replace it was asked for before any work was done
        with atomic_path(report, overwrite=True) as temporary:
            mapping.write(temporary)
    if table is not None:
        counts = mapping.counts
        logger.info(
            f"By {source} {counts.get('renamed', 0):,} gene(s) were renamed; {counts.get('ambiguous', 0):,} "
            f"ambiguous one(s) were left out."
        )
    return mapping.names


def overlap_report(alignment: GeneAlignment) -> str:
    """One line on how the genes of the query match the model's panel."""
    extra = f"; {alignment.n_duplicates} repeated column(s) were summed" if alignment.n_duplicates else ""
    return (
        f"{alignment.n_matched:,} of the model's {alignment.panel_size:,} genes found ({alignment.overlap:.1%}), "
        f"{alignment.n_absent:,} absent, {alignment.n_unused:,} of the query's not used{extra}."
    )


def run_facts(query: BinnedQuery, loaded: LoadedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of every run: for `uns`, and for the summary."""
    alignment = query.alignment
    overlap = {
        "panel": alignment.panel_size,
        "matched": alignment.n_matched,
        "absent": alignment.n_absent,
        "unused": alignment.n_unused,
        "duplicates": alignment.n_duplicates,
        "share": float(alignment.overlap),
    }
    both = {
        "model": loaded.name,
        "gene_overlap": overlap,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    told = {
        "cells": query.n_cells,
        "genes_found": alignment.n_matched,
        "genes_of_model": alignment.panel_size,
        "device": str(loaded.device),
    }
    return {**both, "versions": versions()}, {**told, **both}


def progress_bar(total: int, title: str, shown: bool = True) -> tqdm:
    """A bar of cells on stderr, where that is a terminal."""
    return tqdm(total=total, desc=title, unit=" cells", disable=None if shown else True, smoothing=0.05)


def add_parts(adata: AnnData, parts: dict[str, Any]) -> AnnData:
    """Put ``{"obs": ..., "obsm": ..., "uns": ...}`` into an AnnData, and take its ``"stale"`` columns of obs away."""
    for name in parts.get("stale", ()):
        del adata.obs[name]
    for slot in ("obs", "obsm", "uns"):
        for name, value in parts.get(slot, {}).items():
            getattr(adata, slot)[name] = value
    return adata


def write_parts(query, adata: AnnData, parts: dict[str, Any], output, overwrite: bool) -> None:
    """Write the query with `parts` added, or a .csv of the columns of `obs` alone; complete or not at all."""
    if Path(output).suffix.lower() == ".csv":
        with atomic_path(output, overwrite, inputs=(query,)) as temporary:
            pd.DataFrame(parts["obs"], index=adata.obs_names).to_csv(temporary, index_label="cell")
        return
    if adata.isbacked:
        # the handle must not stand open on a file that is copied
        adata.file.close()
        atomic_copy_h5ad(query, output, **parts, overwrite=overwrite)
        return
    atomic_write_h5ad(add_parts(adata, parts), output, overwrite=overwrite, inputs=(query,))
