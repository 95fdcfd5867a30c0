"""Gene names of a query brought to the model's, with a report for the user."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..data.read_gene_table import load_gene_table, shipped_gene_table
from ..data.write_output import atomic_path
from ..tokenization import map_genes
from ..tokenization.genes_scbert import looks_like_ensembl

logger = logging.getLogger(__name__)


def name_genes(
    gene_names: Sequence[str],
    gene_panel: Sequence[str],
    gene_table: str | Path | None = None,
    report: str | Path | None = None,
) -> list[str]:
    """
    Names of the query's genes in the model's words.

    Parameters
    ----------
    gene_names
        Of the query's columns.
    gene_panel
        Of the model.
    gene_table
        Table of other names (HGNC complete set or NCBI gene_info), ``"hgnc"`` to download it once. Without it names are
        matched exactly; only a file that names all its genes by Ensembl ids is mapped by the table that ships.
    report
        CSV file to write: every gene matched, renamed, ambiguous, unused or absent.

    Returns
    -------
    list of str
        One name per column.
    """
    table, source = None, "the gene table"
    if gene_table is not None:
        table = load_gene_table(gene_table)
    elif looks_like_ensembl(gene_names) and not looks_like_ensembl(gene_panel):
        table, source = shipped_gene_table(), "the table of Ensembl ids that ships"
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
