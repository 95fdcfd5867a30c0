"""Over-representation of gene sets among a list of genes, offline, from any .gmt file."""

import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from ..extras import require
from ..tokenization import InputError

COLUMNS = ["term", "n_overlap", "n_set", "odds_ratio", "p_value", "adjusted_p_value", "genes"]


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """
    Gene sets of a .gmt or .gmt.gz file, as from MSigDB or Enrichr: name of a set -> its genes.

    Every gene stands there once, in the file's order; one written ``SYMBOL,1.0`` (Enrichr's weights) is read as SYMBOL.
    Of sets of one name the genes are joined.
    """
    sets: dict[str, dict[str, None]] = {}
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            name, *rest = line.rstrip("\r\n").split("\t")
            genes = [gene.partition(",")[0].strip() for gene in rest[1:]]
            if name.strip() and any(genes):
                sets.setdefault(name.strip(), {}).update(dict.fromkeys(gene for gene in genes if gene))
    if not sets:
        raise InputError(
            f"{path} holds no gene set. A .gmt file has one set a line: name, description and genes, "
            f"separated by tabs."
        )
    return {name: list(genes) for name, genes in sets.items()}


def enrich_genes(
    genes: Iterable[str],
    gene_sets: Mapping[str, Iterable[str]],
    background: Iterable[str],
    min_size: int = 5,
    max_size: int = 1000,
) -> pd.DataFrame:
    """
    Gene sets that hold more of the given genes than chance would, by the hypergeometric test (gseapy's `enrich`).

    The `background` is all genes that could have been in the list: the model's panel, or its expressed part. Genes and
    sets are cut down to it; a whole genome as background would find the tissue instead of the question. Sets with fewer
    genes within it than `min_size`, or more than `max_size`, are left out.

    The table has a row per set with at least one of the genes, smallest p-value first: ``term, n_overlap, n_set``
    (genes of the set in the background), ``odds_ratio, p_value, adjusted_p_value`` (Benjamini-Hochberg over the sets
    that have at least one hit) and ``genes`` (joined by ";").

    Examples
    --------
    >>> sets = {"T cells": ["CD3D", "CD3E"], "B cells": ["MS4A1", "CD79A"]}
    >>> table = enrich_genes(["CD3D", "CD3E"], sets, ["CD3D", "CD3E", "MS4A1", "CD79A"], min_size=1)
    >>> table[["term", "n_overlap"]].values.tolist()
    [['T cells', 2]]
    """
    universe = dict.fromkeys(map(str, background))
    asked = [gene for gene in dict.fromkeys(map(str, genes)) if gene in universe]
    within = {
        name: [gene for gene in dict.fromkeys(members) if gene in universe]
        for name, members in gene_sets.items()
    }
    kept = {name: members for name, members in within.items() if min_size <= len(members) <= max_size}
    # gseapy logs an error and returns a list when nothing overlaps: answered before it is asked.
    hit = set(asked) & {gene for members in kept.values() for gene in members}
    if not hit:
        return pd.DataFrame(columns=COLUMNS)
    result = require("gseapy").enrich(
        asked, gene_sets=kept, background=list(universe), outdir=None, no_plot=True, verbose=False
    )
    table = result.results
    overlap = table["Overlap"].str.split("/", expand=True).astype(int)
    tidy = pd.DataFrame(
        {
            "term": table["Term"],
            "n_overlap": overlap[0],
            "n_set": overlap[1],
            "odds_ratio": table["Odds Ratio"].astype(float),
            "p_value": table["P-value"].astype(float),
            "adjusted_p_value": table["Adjusted P-value"].astype(float),
            "genes": table["Genes"].map(lambda joined: ";".join(sorted(joined.split(";")))),
        }
    )
    return tidy.sort_values(["p_value", "term"], kind="stable", ignore_index=True)


def enrich_by_type(
    top_genes: Mapping[str, Iterable[str]],
    gene_sets: str | Path | Mapping[str, Iterable[str]],
    background: Iterable[str],
) -> pd.DataFrame:
    """
    `enrich_genes` for the top genes of every cell type, in one table with a first column ``cell_type``; by the sets of
    a .gmt(.gz) file, or name -> genes.

    Adjusted p-values are within a type.
    """
    if isinstance(gene_sets, str | Path):
        gene_sets = read_gmt(gene_sets)
    universe = list(background)
    tables = []
    for cell_type, genes in top_genes.items():
        table = enrich_genes(genes, gene_sets, universe)
        if len(table):
            table.insert(0, "cell_type", cell_type)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["cell_type", *COLUMNS])
