"""Do the genes that a model looks at agree with what is known: marker tables and differential expression."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.read import log_normalize
from ..evaluation.baselines import UNLABELLED
from ..extras import require
from ..tokenization import InputError

# names of the columns (type, gene) of the tables that circulate
TABLE_COLUMNS = [
    ("cell type", "official gene symbol"),  # PanglaoDB
    ("CT", "Gene"),  # CellMarker, genes joined by commas
    ("cell_name", "Symbol"),  # CellMarker 2.0 download
    ("cell_type", "gene"),
]


def top_genes_table(scores: pd.DataFrame, n_top: int = 20) -> pd.DataFrame:
    """
    The highest-scoring genes of every cell type, with two z-scores.

    Parameters
    ----------
    scores
        One score per gene and type (mean attention or attribution), [genes, types], named on both axes.
    n_top
        Genes per type; fewer where there are fewer.

    Returns
    -------
    pandas.DataFrame
        ``cell_type, rank`` (from 1), ``gene, score``, ``z_score`` (against all genes of that type: how far it
        stands out) and ``specificity`` (against the same gene in all types: is it this type's). A z-score is 0
        where everything is equal. Sorted by type, in the order of the columns, and rank; equal scores keep the
        order of the rows.

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


def read_marker_table(path: str | Path, species: str = "Hs") -> dict[str, list[str]]:
    """
    Known markers by cell type, from PanglaoDB, CellMarker, or any table with columns ``cell_type`` and ``gene``.

    Parameters
    ----------
    path
        .csv or .tsv/.txt, plain or .gz. Genes may be one a row or joined by commas.
    species
        For PanglaoDB: only rows whose ``species`` names it ("Hs" or "Mm").

    Returns
    -------
    dict
        Cell type -> its markers, each once, sorted; types of one name in several tissues are joined.

    Raises
    ------
    InputError
        When no known pair of columns is found.

    Examples
    --------
    >>> Path("markers.csv").write_text("cell_type,gene\\nT,CD3E\\nT,CD3D\\n")
    29
    >>> read_marker_table("markers.csv")
    {'T': ['CD3D', 'CD3E']}
    """
    stem = str(path).removesuffix(".gz").lower()
    table = pd.read_csv(path, sep="," if stem.endswith(".csv") else "\t", dtype=str)
    for type_column, gene_column in TABLE_COLUMNS:
        if {type_column, gene_column} <= set(table.columns):
            break
    else:
        known = "; ".join(f"{a!r} and {b!r}" for a, b in TABLE_COLUMNS)
        raise InputError(
            f"{path} is no marker table: its columns are {', '.join(table.columns[:6])}; needed are {known}."
        )
    if "species" in table:
        table = table[table["species"].fillna("").str.split().map(lambda names: species in names)]
    table = table[[type_column, gene_column]].dropna()
    genes = table[gene_column].str.split(",").explode().str.strip()
    markers: dict[str, set[str]] = {}
    for cell_type, gene in zip(table[type_column].loc[genes.index].str.strip(), genes):
        if gene:
            markers.setdefault(cell_type, set()).add(gene)
    return {cell_type: sorted(found) for cell_type, found in sorted(markers.items())}


def marker_overlap(
    top_genes: Mapping[str, Iterable[str]],
    markers: Mapping[str, Iterable[str]],
    background: Iterable[str],
    names: Mapping[str, str | Sequence[str]] | None = None,
) -> pd.DataFrame:
    """
    How many of a type's top genes are known markers of that type, against chance.

    Parameters
    ----------
    top_genes
        Cell type -> its top genes.
    markers
        Cell type of the marker table -> markers (`read_marker_table`).
    background
        All genes that could have been on top: the model's panel. Everything is cut down to it.
    names
        Cell type of the data -> name(s) in the marker table. Default: names that agree but for case, an
        ending "s" and a word "cell(s)".

    Returns
    -------
    pandas.DataFrame
        One row per type: ``cell_type, known_as`` (joined by ";", empty where the table has no such type),
        ``n_top, n_markers, n_overlap, expected`` (overlap by chance), ``p_value`` (hypergeometric, at least as
        many), ``genes``. Numbers are NaN where the type isn't known.

    Raises
    ------
    InputError
        When `names` points to a type that the table doesn't hold.

    Examples
    --------
    >>> table = marker_overlap({"B cell": ["MS4A1", "ACTB"]}, {"B cells": ["MS4A1"]}, ["MS4A1", "ACTB", "CD3D"])
    >>> table[["known_as", "n_overlap", "genes"]].values.tolist()
    [['B cells', 1, 'MS4A1']]
    """
    universe = set(map(str, background))
    rows = []
    for cell_type, genes in top_genes.items():
        known_as = _known_names(cell_type, markers, names)
        top = set(map(str, genes)) & universe
        known = {gene for name in known_as for gene in markers[name]} & universe
        row: dict[str, Any] = {"cell_type": cell_type, "known_as": ";".join(known_as), "n_top": len(top)}
        if known_as:
            shared = sorted(top & known)
            tail = require("scipy.stats", "explain").hypergeom.sf(
                len(shared) - 1, len(universe), len(known), len(top)
            )
            row |= {
                "n_markers": len(known),
                "n_overlap": len(shared),
                "expected": len(top) * len(known) / max(len(universe), 1),
                "p_value": float(tail),
                "genes": ";".join(shared),
            }
        rows.append(row)
    columns = ["cell_type", "known_as", "n_top", "n_markers", "n_overlap", "expected", "p_value", "genes"]
    return pd.DataFrame(rows).reindex(columns=columns)


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
    adata: Any,
    label_key: str,
    n_top: int = 50,
    layer: str | None = None,
    input: str = "auto",
) -> pd.DataFrame:
    """
    Agreement of gene scores with each type's differential expression (t-test) against all other cells.

    Parameters
    ----------
    scores
        [genes, types]; genes that the data doesn't hold, and types with fewer than two cells, are left out.
    adata
        Cells with counts or log1p values; not changed.
    label_key
        Column of obs with the cell types.
    n_top
        Length of the two lists compared.
    layer, input
        As everywhere: where the values are, and of what kind.

    Returns
    -------
    pandas.DataFrame
        One row per type: ``cell_type, n_genes`` compared, ``n_top``, ``overlap`` (share of the top genes by
        score that are among the top by differential expression), ``expected`` (that share by chance),
        ``spearman`` (rank correlation over all genes; NaN when one side is constant), ``genes`` (shared).

    Examples
    --------
    >>> agreement = differential_expression_agreement(scores, adata, "cell_type")  # doctest: +SKIP
    >>> agreement[["cell_type", "overlap", "expected"]]  # doctest: +SKIP
    """
    scanpy, anndata = require("scanpy", "explain"), require("anndata", "explain")
    labels = adata.obs[label_key].astype(object).astype(str)
    sizes = labels[~labels.isin(UNLABELLED)].value_counts()
    types = [name for name in scores.columns if sizes.get(str(name), 0) >= 2]
    matrix, genes = log_normalize(adata, layer, input)
    shared = [gene for gene in genes if gene in scores.index]
    if len(sizes) < 2 or not types or not shared:
        raise InputError(
            f"Nothing can be compared: {len(types)} cell types of the scores have at least two cells in "
            f"{label_key!r}, which holds {len(sizes)} types, and {len(shared)} genes are in both."
        )
    kept = labels.isin(sizes.index).to_numpy()
    columns = np.flatnonzero(np.isin(genes, shared))
    cells = anndata.AnnData(
        matrix[kept][:, columns],
        obs=pd.DataFrame(
            {"type": pd.Categorical(labels[kept].to_numpy())}, index=adata.obs_names[kept].astype(str)
        ),
        var=pd.DataFrame(index=pd.Index(shared)),
    )
    scanpy.tl.rank_genes_groups(cells, "type", groups=[str(name) for name in types], method="t-test")
    rows = [_agreement(scores, name, _expression_scores(scanpy, cells, name), n_top) for name in types]
    return pd.DataFrame(rows)


def _expression_scores(scanpy: Any, cells: Any, cell_type: str) -> pd.Series:
    table = scanpy.get.rank_genes_groups_df(cells, group=str(cell_type)).set_index("names")["scores"]
    # a gene that no cell expresses has no statistic, and is no marker.
    return table.reindex(cells.var_names).fillna(0.0)


def _agreement(scores: pd.DataFrame, cell_type: str, expression: pd.Series, n_top: int) -> dict[str, Any]:
    values = scores.loc[expression.index, cell_type].to_numpy(dtype=np.float64)
    used = min(n_top, len(values))
    best = set(np.argsort(-values, kind="stable")[:used].tolist())
    differential = set(np.argsort(-expression.to_numpy(), kind="stable")[:used].tolist())
    constant = np.ptp(values) == 0 or np.ptp(expression.to_numpy()) == 0
    correlation = float("nan")
    if not constant:
        spearmanr = require("scipy.stats", "explain").spearmanr
        correlation = float(spearmanr(values, expression.to_numpy()).statistic)
    return {
        "cell_type": cell_type,
        "n_genes": len(values),
        "n_top": used,
        "overlap": len(best & differential) / used,
        "expected": used / len(values),
        "spearman": correlation,
        "genes": ";".join(sorted(expression.index[list(best & differential)])),
    }
