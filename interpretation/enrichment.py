"""Over-representation of gene sets among a list of genes, offline, from any .gmt file."""

import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

from ..tokenization import InputError
from ..tokenization.genes_scbert import open_text

COLUMNS = ["term", "n_overlap", "n_set", "odds_ratio", "p_value", "adjusted_p_value", "genes"]


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """
    Gene sets of a .gmt or .gmt.gz file, as from MSigDB or Enrichr: name of a set -> its genes.

    Every gene stands there once, in the file's order; one written ``SYMBOL,1.0`` (Enrichr's weights) is read as SYMBOL.
    Of sets of one name the genes are joined.
    """
    sets: dict[str, dict[str, None]] = {}
    try:
        with open_text(path) as file:
            lines = file.read().splitlines()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is no text, plain or compressed: {error}.") from error
    for line in lines:
        name, *rest = line.split("\t")
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
    Gene sets that hold more of the given genes than chance would, by the hypergeometric test.

    The `background` is all genes that could have been in the list: the model's panel, or its expressed part. Genes and
    sets are cut down to it; a whole genome as background would find the tissue instead of the question. Sets with fewer
    genes within it than `min_size`, or more than `max_size`, are left out.

    The table has a row per set with at least one of the genes, smallest p-value first: ``term, n_overlap, n_set``
    (genes of the set in the background), ``odds_ratio, p_value, adjusted_p_value`` (Benjamini-Hochberg over all sets
    that were tested, those without a hit as well) and ``genes`` (joined by ";").

    Examples
    --------
    >>> sets = {"T cells": ["CD3D", "CD3E"], "B cells": ["MS4A1", "CD79A"]}
    >>> table = enrich_genes(["CD3D", "CD3E"], sets, ["CD3D", "CD3E", "MS4A1", "CD79A"], min_size=1)
    >>> table[["term", "n_overlap"]].values.tolist()
    [['T cells', 2]]
    """
    universe = set(map(str, background))
    asked = set(map(str, genes)) & universe
    within = {term: universe & set(members) for term, members in gene_sets.items()}
    tested = {term: members for term, members in within.items() if min_size <= len(members) <= max_size}
    table = pd.DataFrame({"term": list(tested), "n_set": [len(members) for members in tested.values()]})
    shared = [sorted(asked & members) for members in tested.values()]
    table["n_overlap"] = both = np.array([len(found) for found in shared], dtype=int)
    only_set, only_asked = table["n_set"] - both, len(asked) - both
    neither = len(universe) - only_set - len(asked)
    # halves: no cell of the table of counts is 0 (Haldane and Anscombe)
    table["odds_ratio"] = (both + 0.5) * (neither + 0.5) / ((only_set + 0.5) * (only_asked + 0.5))
    table["p_value"] = hypergeom.sf(both - 1, len(universe), table["n_set"], len(asked))
    table["adjusted_p_value"] = false_discovery_control(table["p_value"]) if len(table) else []
    table["genes"] = [";".join(found) for found in shared]
    table = table.loc[both > 0, COLUMNS]
    return table.sort_values(["p_value", "term"], kind="stable", ignore_index=True)


def enrich_by_type(
    top_genes: Mapping[str, Iterable[str]],
    gene_sets: Mapping[str, Iterable[str]],
    background: Iterable[str],
) -> pd.DataFrame:
    """
    `enrich_genes` for the top genes of every cell type, in one table with a first column ``cell_type``.

    Adjusted p-values are within a type.
    """
    universe = list(background)
    tables = []
    for cell_type, genes in top_genes.items():
        table = enrich_genes(genes, gene_sets, universe)
        if len(table):
            table.insert(0, "cell_type", cell_type)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["cell_type", *COLUMNS])
