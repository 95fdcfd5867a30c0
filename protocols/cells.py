"""Labelled cells of one or several files, brought together for a benchmark."""

import re
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

from ..data.cell_ontology import read_table
from ..data.labels import choose_classes, find_labels
from ..data.read import read_cells
from ..tokenization import InputError, align_genes, detect_input_kind, gene_names_of, select_matrix
from ..tokenization.cells_scbert import feature_modalities
from ..tokenization.expression_scbert import as_csr

LABEL, DATASET, SPLIT = "label", "dataset", "split"
# where the cells say what their values are: in uns, "counts" or "log1p"
INPUT = "input"
MODALITY = "feature_types"


def load_benchmark_cells(
    paths: Sequence[str | Path],
    label_key: str,
    label_map: str | Path | None = None,
    layer: str | None = None,
    max_cells: int | None = None,
    seed: int = 0,
    input: str = "auto",
) -> anndata.AnnData:
    """
    Read labelled cells; of several files the genes that all of them have.

    The `label_key` is the column of obs with the types, or one for each file, separated by commas. A `label_map`, a CSV
    with the columns ``from`` and ``to``, has other names for types; types that it lacks are left out. Of more than
    `max_cells` labelled cells a random part is taken, the same share of every type. The `layer` holds the values, which
    are `input`: ``"counts"``, ``"log1p"`` or ``"auto"``, which is found out of the whole files.

    The values are as they stand in the files (CSR float32), with ``obs["label"]`` (str) and, of several files,
    ``obs["dataset"]`` (their names) beside their columns; ``var["feature_types"]`` where the features are of several
    modalities; ``uns["input"]``, what the values are.
    """
    keys = [key.strip() for key in label_key.split(",")]
    if len(keys) not in (1, len(paths)):
        raise InputError(f"{len(keys)} label keys for {len(paths)} files: give one, or one for each file.")
    keys = keys * len(paths) if len(keys) == 1 else keys
    names = None if label_map is None else dict(read_table(label_map, ("from", "to"))[["from", "to"]].values)
    datasets = _dataset_names(paths) if len(paths) > 1 else [None]
    parts = [_read_one(*of, names, layer, input) for of in zip(paths, keys, datasets)]
    cells = parts[0] if len(parts) == 1 else _join(parts)
    kind = parts[0].uns[INPUT]
    classes, _ = choose_classes(cells.obs[LABEL].tolist(), label_key)
    cells = cells[cells.obs[LABEL].isin(classes).to_numpy()]
    if max_cells and cells.n_obs > max_cells:
        cells = cells[_stratified_part(cells.obs[LABEL].to_numpy(), max_cells, seed)]
    cells = cells.copy()
    cells.uns[INPUT] = kind
    return cells


def input_of(cells: anndata.AnnData) -> str:
    """What the values of benchmark cells are, as `load_benchmark_cells` was told or found."""
    return str(cells.uns.get(INPUT, "auto"))


def _dataset_names(paths: Sequence[str | Path]) -> list[str]:
    """Names of files without their format, each once."""
    names = [re.sub(r"\.(h5ad|h5|h5mu|zarr)$", "", Path(path).name) for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"Several files are called {twice!r}. The name says which dataset a cell is of (in obs['dataset']): give "
            "each file one of its own."
        )
    return names


def _read_one(path, key, dataset, names, layer, input: str) -> anndata.AnnData:
    """One file with the types of its labelled cells in obs["label"], each gene once."""
    source = read_cells(path, layer=layer)
    labels = find_labels(source.obs, key, str(path))
    if names is not None:
        labels = np.array([names.get(label) for label in labels], dtype=object)
    matrix, of = select_matrix(source, layer)
    matrix = as_csr(matrix)
    genes = gene_names_of(of.var, of.var_names)
    unique = list(dict.fromkeys(genes))
    values = align_genes(genes, unique).apply(matrix)
    kept = np.array([label is not None for label in labels], dtype=bool)
    obs = source.obs.loc[kept].copy()
    obs[LABEL] = labels[kept]
    if dataset is not None:
        obs[DATASET] = dataset
        obs.index = [f"{dataset}:{name}" for name in obs.index]
    cells = anndata.AnnData(sp.csr_matrix(values[np.flatnonzero(kept)], dtype=np.float32), obs=obs)
    cells.var_names = unique
    if feature_modalities(of.var) is not None:
        # of a repeated name the first
        kind_of = dict(zip(reversed(genes), reversed(of.var[MODALITY].astype(str).tolist())))
        cells.var[MODALITY] = [kind_of[gene] for gene in unique]
    cells.obs_names_make_unique()
    # of all genes of the file: of a part of them, log1p values could not be told any more
    cells.uns[INPUT] = detect_input_kind(matrix) if input == "auto" else input
    return cells


def _join(parts: list[anndata.AnnData]) -> anndata.AnnData:
    kinds = {part.uns[INPUT] for part in parts}
    if len(kinds) > 1:
        raise InputError(f"The files hold different kinds of values ({', '.join(sorted(kinds))}).")
    if any(not part.n_obs for part in parts):
        raise InputError("A file has no labelled cell: check the label keys and the label map.")
    joined = anndata.concat(parts, join="inner", merge="first")
    if not joined.n_vars:
        raise InputError("The files share no gene name.")
    return joined


def _stratified_part(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sorted rows of about n cells, the same share of each type and at least ten."""
    rng, chosen = np.random.default_rng(seed), []
    for name in np.unique(labels):
        rows = np.flatnonzero(labels == name)
        size = min(len(rows), max(10, round(n * len(rows) / len(labels))))
        chosen.append(rng.choice(rows, size, replace=False))
    return np.sort(np.concatenate(chosen))
