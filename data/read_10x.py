"""The two forms 10x Genomics' Cell Ranger writes: matrix folders and .h5 files."""

import csv
import logging

import anndata
import h5py
import pandas as pd
import scipy.io
import scipy.sparse as sp

from ..tokenization import InputError
from ..tokenization.genes_scbert import open_text
from .paths import visible

logger = logging.getLogger(__name__)

GENE_EXPRESSION = "Gene Expression"


def _find(folder, names):
    """The one file in `folder` ending in one of `names`, gzip-compressed or not, whatever its prefix."""
    found = [
        path
        for path in visible(folder)
        if path.is_file() and path.name.removesuffix(".gz").endswith(tuple(names))
    ]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds several files named like {names[0]} "
            f"({', '.join(path.name for path in found[:4])}); put one sample into one folder."
        )
    return found[0] if found else None


def read_10x_folder(folder, every_feature=False):
    """Read matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, gzip-compressed or not.

    The AnnData has CSR counts, symbols in `var_names`, ids in ``var["gene_ids"]``; gene expression only, unless
    `every_feature` keeps others too, such as peaks.
    """
    matrix_file = _find(folder, ["matrix.mtx"])
    features_file = _find(folder, ["features.tsv", "genes.tsv"])
    barcodes_file = _find(folder, ["barcodes.tsv"])
    if features_file is None or barcodes_file is None:
        raise InputError(
            f"{folder} needs features.tsv (or genes.tsv) and barcodes.tsv beside {matrix_file.name}."
        )
    features, barcodes = _read_table(features_file), _read_table(barcodes_file)
    matrix = sp.csr_matrix(scipy.io.mmread(matrix_file).T.astype("float32"))
    if matrix.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{folder}: the matrix has {matrix.shape[0]} cells x {matrix.shape[1]} genes, but there are "
            f"{len(barcodes)} barcodes and {len(features)} features."
        )
    columns = list(zip(*features))
    # a file of one column holds symbols only
    ids, symbols = columns[0], columns[min(1, len(columns) - 1)]
    known = {"gene_ids": ids} | ({"feature_types": columns[2]} if len(columns) > 2 else {})
    return _assemble(matrix, [row[0] for row in barcodes], symbols, known, every_feature)


def _read_table(path):
    with open_text(path) as handle:
        return [row for row in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE) if row]


def read_10x_h5(path, every_feature=False):
    """Read a Cell Ranger .h5 file, of version 3 and later or of version 2 (one genome).

    As `read_10x_folder`; with ``var["genome"]`` where the file says it.
    """
    with h5py.File(path, "r") as file:
        group = _matrix_group(file, path)
        n_genes, n_cells = group["shape"][:]
        # genes x cells in CSC is cells x genes in CSR
        matrix = sp.csr_matrix(
            (group["data"][:].astype("float32"), group["indices"][:], group["indptr"][:]),
            shape=(n_cells, n_genes),
        )
        # version 2 has no features
        table = group.get("features") or {"name": group["gene_names"], "id": group["genes"]}
        columns = {"gene_ids": "id", "feature_types": "feature_type", "genome": "genome"}
        known = {ours: table[name].asstr()[:] for ours, name in columns.items() if name in table}
        return _assemble(matrix, group["barcodes"].asstr()[:], table["name"].asstr()[:], known, every_feature)


def _matrix_group(file, path):
    if "matrix" in file:
        return file["matrix"]
    groups = [name for name, group in file.items() if "barcodes" in group]
    if len(groups) > 1:
        raise InputError(
            f"{path} holds several genomes ({', '.join(groups)}); write the human one to its own file."
        )
    return file[groups[0]]


def _assemble(matrix, barcodes, symbols, columns, every_feature):
    """An AnnData with these columns of `var`, and of these features, as far as they are asked for."""
    columns = {name: list(values) for name, values in columns.items()}
    var = pd.DataFrame(columns, index=pd.Index(list(symbols), dtype=object))
    obs = pd.DataFrame(index=pd.Index(list(barcodes), dtype=object))
    adata = anndata.AnnData(matrix, obs=obs, var=var)
    if every_feature or GENE_EXPRESSION not in columns.get("feature_types", ()):
        return adata
    expression = (var["feature_types"] == GENE_EXPRESSION).to_numpy()
    if not expression.all():
        logger.warning("%d features other than gene expression are left out.", int((~expression).sum()))
    return adata[:, expression].copy()
