"""Do the genes that a model looks at agree with what is known: marker tables and differential expression."""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control, hypergeom, spearmanr

from ..data.labels import find_labels
from ..data.read import log_normalize
from ..extras import require
from ..tokenization import InputError

# names of the columns (type, gene) of the tables that circulate
TABLE_COLUMNS = [
    ("cell type", "official gene symbol"),  # PanglaoDB
    ("CT", "Gene"),  # CellMarker, genes joined by commas
    ("cell_name", "Symbol"),  # CellMarker 2.0 download
    ("cell_type", "gene"),
]
# what they call the species
HUMAN = frozenset({"Hs", "Human"})


def top_genes_table(scores: pd.DataFrame, n_top: int = 20) -> pd.DataFrame:
    """
    The highest-scoring genes of every cell type, of `scores` [genes, types], named on both axes.

    The table has ``cell_type, rank`` (from 1), ``gene, score``, ``z_score`` (against all genes of that type: how far it
    stands out) and ``specificity`` (against the same gene in all types: is it this type's). A z-score is 0 where
    everything is equal. It is sorted by type, in the order of the columns, and rank; equal scores keep the order of the
    rows.

    Examples
    --------
    >>> scores = pd.DataFrame({"T": [3.0, 1.0, 2.0], "B": [1.0, 3.0, 2.0]}, index=["CD3D", "MS4A1", "ACTB"])
    >>> top_genes_table(scores, 1)[["cell_type", "gene", "z_score", "specificity"]].round(2).values.tolist()
    [['T', 'CD3D', 1.22, 1.0], ['B', 'MS4A1', 1.22, 1.0]]
    """
    values = scores.to_numpy(dtype=np.float64)
    over_genes, over_types = _z_scores(values, axis=0), _z_scores(values, axis=1)
    tables = []
    for column, cell_type in enumerate(scores.columns):
        best = np.argsort(-values[:, column], kind="stable")[:n_top]
        tables.append(
            pd.DataFrame(
                {
                    "cell_type": cell_type,
                    "rank": np.arange(1, len(best) + 1),
                    "gene": scores.index[best],
                    "score": values[best, column],
                    "z_score": over_genes[best, column],
                    "specificity": over_types[best, column],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _z_scores(values: np.ndarray, axis: int) -> np.ndarray:
    centred = values - values.mean(axis=axis, keepdims=True)
    spread = values.std(axis=axis, keepdims=True)
    # of equal values rounding leaves a spread near 1e-17, and quotients that mean nothing.
    tiny = 1e-12 * np.abs(values).max(initial=0.0)
    return np.where(spread > tiny, centred / np.where(spread > tiny, spread, 1.0), 0.0)


def read_marker_table(path: str | Path) -> dict[str, list[str]]:
    """
    Known markers by cell type, from PanglaoDB, CellMarker, or any table with columns ``cell_type`` and ``gene``.

    The table is a .csv or .tsv/.txt, plain or .gz, its genes one a row or joined by commas; where it has a ``species``,
    rows that name neither "Hs" (PanglaoDB) nor "Human" (CellMarker 2.0) are left out. Markers are sorted, each once;
    types of one name in several tissues are joined.
    """
    stem = str(path).removesuffix(".gz").lower()
    try:
        table = pd.read_csv(path, sep="," if stem.endswith(".csv") else "\t", dtype=str)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is no table of text: {error}.") from error
    for type_column, gene_column in TABLE_COLUMNS:
        if {type_column, gene_column} <= set(table.columns):
            break
    else:
        known = "; ".join(f"{a!r} and {b!r}" for a, b in TABLE_COLUMNS)
        raise InputError(
            f"{path} is no marker table: its columns are {', '.join(table.columns[:6])}; needed are {known}."
        )
    if "species" in table:
        table = table[table["species"].fillna("").str.split().map(HUMAN.intersection).astype(bool)]
    table = table[[type_column, gene_column]].dropna()
    genes = table[gene_column].str.split(",").explode().str.strip()
    genes = genes[genes != ""]
    if genes.empty:
        raise InputError(f"{path} holds no marker of a human cell type.")
    cell_types = table[type_column].str.strip().loc[genes.index].to_numpy()
    return {cell_type: sorted(set(found)) for cell_type, found in genes.groupby(cell_types)}


def marker_overlap(
    top_genes: Mapping[str, Iterable[str]],
    markers: Mapping[str, Iterable[str]],
    background: Iterable[str],
    names: Mapping[str, str | Sequence[str]] | None = None,
) -> pd.DataFrame:
    """
    How many of a type's top genes are known markers of that type, against chance.

    Everything is cut down to the `background`: all genes that could have been on top; markers are found in it however
    their letters are cased. `names` are type of the data -> name(s) in the marker table, which has to hold them; for
    other types names that agree but for case, an ending "s" and a word "cell(s)".

    The table has a row per type: ``cell_type, known_as`` (joined by ";", empty where the table has no such type),
    ``n_top, n_markers, n_overlap, expected`` (overlap by chance), ``p_value`` (hypergeometric, at least as many),
    ``adjusted_p_value`` (Benjamini-Hochberg over types) and ``genes``. Numbers are NaN where the type isn't known.

    Examples
    --------
    >>> table = marker_overlap({"B cell": ["MS4A1", "ACTB"]}, {"B cells": ["MS4A1"]}, ["MS4A1", "ACTB", "CD3D"])
    >>> table[["known_as", "n_overlap", "genes"]].values.tolist()
    [['B cells', 1, 'MS4A1']]
    """
    # PanglaoDB has C1orf54 as C1ORF54
    of_marker = {str(gene).upper(): str(gene) for gene in background}
    universe, rows = set(of_marker.values()), []
    for cell_type, genes in top_genes.items():
        known_as = _known_names(cell_type, markers, names)
        top = set(map(str, genes)) & universe
        known = {of_marker.get(gene.upper()) for name in known_as for gene in markers[name]} - {None}
        row: dict[str, Any] = {"cell_type": cell_type, "known_as": ";".join(known_as), "n_top": len(top)}
        if known_as:
            shared = sorted(top & known)
            row |= {
                "n_markers": len(known),
                "n_overlap": len(shared),
                "expected": len(top) * len(known) / max(len(universe), 1),
                "p_value": float(hypergeom.sf(len(shared) - 1, len(universe), len(known), len(top))),
                "genes": ";".join(shared),
            }
        rows.append(row)
    columns = ["cell_type", "known_as", "n_top", "n_markers", "n_overlap", "expected", "p_value"]
    table = pd.DataFrame(rows).reindex(columns=[*columns, "adjusted_p_value", "genes"])
    tested = table["p_value"].notna()
    if tested.any():
        table.loc[tested, "adjusted_p_value"] = false_discovery_control(table.loc[tested, "p_value"])
    return table


def _known_names(cell_type: str, markers: Mapping, names: Mapping | None) -> list[str]:
    if names is not None and cell_type in names:
        chosen = names[cell_type]
        chosen = [chosen] if isinstance(chosen, str) else list(chosen)
        absent = [name for name in chosen if name not in markers]
        if absent:
            raise InputError(
                f"The marker table has no cell type {absent[0]!r} (given for {cell_type!r}); it has "
                f"{len(markers)}, such as {', '.join(list(markers)[:5])}."
            )
        return chosen
    return [name for name in markers if _plain(name) == _plain(cell_type)]


def _plain(name: str) -> str:
    words = [word.removesuffix("s") for word in str(name).lower().replace("_", " ").split()]
    return " ".join(word for word in words if word != "cell")


def differential_expression_agreement(
    scores: pd.DataFrame,
    adata: AnnData,
    label_key: str,
    n_top: int = 50,
    input: str = "auto",
) -> pd.DataFrame:
    """
    Agreement of gene scores [genes, types] with each type's differential expression (t-test) against all other cells.

    Genes that the data doesn't hold, and types with fewer than two cells, are left out. The table has a row per type:
    ``cell_type, n_genes`` compared, ``n_top``, ``overlap`` (share of the top genes by score that are among the top by
    differential expression), ``expected`` (that share by chance), ``spearman`` (rank correlation over all genes; NaN
    when one side is constant) and ``genes`` (shared).
    """
    scanpy = require("scanpy", "explain")
    labels = find_labels(adata.obs, label_key, "the cells")
    sizes = pd.Series(labels).value_counts()
    types = [name for name in scores.columns if sizes.get(name, 0) >= 2]
    matrix, genes = log_normalize(adata, None, input, list(scores.index))
    shared = [gene for gene in genes if gene in scores.index]
    if len(sizes) < 2 or not types or not shared:
        raise InputError(
            f"Nothing can be compared: {len(types)} of the explained types "
            f"({', '.join(map(str, scores.columns[:3]))}, ...) have at least two cells in {label_key!r}, whose "
            f"types are {', '.join(sizes.index[:3])}, ...; "
            f"{len(shared)} genes are in both."
        )
    kept = pd.notna(labels)
    columns = np.flatnonzero(np.isin(genes, shared))
    cells = AnnData(
        matrix[kept][:, columns],
        obs=pd.DataFrame({"type": pd.Categorical(labels[kept])}, index=adata.obs_names[kept].astype(str)),
        var=pd.DataFrame(index=pd.Index(shared)),
    )
    scanpy.tl.rank_genes_groups(cells, "type", groups=types, method="t-test")
    rows = []
    for name in types:
        table = scanpy.get.rank_genes_groups_df(cells, group=name).set_index("names")["scores"]
        # a gene that no cell expresses has no statistic, and is no marker.
        rows.append(_agreement(scores, name, table.reindex(cells.var_names).fillna(0.0), n_top))
    return pd.DataFrame(rows)


def _agreement(scores: pd.DataFrame, cell_type: str, expression: pd.Series, n_top: int) -> dict[str, Any]:
    values = scores.loc[expression.index, cell_type].to_numpy(dtype=np.float64)
    used = min(n_top, len(values))
    best = set(np.argsort(-values, kind="stable")[:used].tolist())
    differential = set(np.argsort(-expression.to_numpy(), kind="stable")[:used].tolist())
    constant = np.ptp(values) == 0 or np.ptp(expression.to_numpy()) == 0
    return {
        "cell_type": cell_type,
        "n_genes": len(values),
        "n_top": used,
        "overlap": len(best & differential) / used,
        "expected": used / len(values),
        "spearman": float("nan") if constant else float(spearmanr(values, expression.to_numpy()).statistic),
        "genes": ";".join(sorted(expression.index[list(best & differential)])),
    }
