"""The labelled cells of many studies under common names, for the annotator of tissue."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from annotator_parts import LABEL, named_cells, named_genes
from make_mini import CARDS
from scbert.data.read import log_normalize, read_cells
from scbert.inference.expression_pca import expression_pca
from scbert.inference.voting import leiden_groups
from scbert.tokenization import align_genes
from scbert.tokenization.expression_scbert import as_csr

# labels.csv: the types of every study by common names; markers.csv: genes that tell types; terms.csv: Cell Ontology
TABLES = CARDS / "scbert-mini-tissue"
# file: what it is, licence of the repository it stood in
LEARNT = {
    "pbmc3k_10x": ("blood, one healthy donor, 10x", "MIT"),
    "zheng_facs_pbmc": ("blood sorted by surface markers, Zheng 2017", "BSD-2"),
    "breast_tnbc_wu_cid4465": ("triple-negative breast tumour, GSE176078", "GPL-3"),
    "breast_tumor_copykat": ("breast tumour", "GPL-2"),
    "skin_ctcl_gse128531": ("skin, healthy and with lymphoma, GSE128531", "GPL-3"),
    "malt_lymphoma_streak": ("MALT lymphoma, 10x", "GPL-2+"),
    "scmixology_celseq_dropseq": ("lung cancer cell lines, GSE118767", "MIT"),
    "fetal_cortex_camp": ("fetal cortex, GSE75140", "GPL-2+"),
    "oligodendroglioma_smartseq2": ("oligodendroglioma, GSE70630", "BSD-3"),
}
# in labels.csv in place of a column of obs
BY_MARKERS = "by markers"
# mean log1p CP10k of the markers of a cluster's type, and how many times that of the next type's
LEAST_EXPRESSION, LEAST_RATIO = 0.6, 2.0
# of a type in a study: what a study has more of says little about other studies
MOST_CELLS = 200
# a gene of the panel is expressed by so many cells in each of so many studies; with four of them markers of types that
# few studies have would be missing (VWF, COL3A1, TPSAB1)
PANEL_RULE = {"min_cells": 5, "min_studies": 2}


def read_study(data: Path, study: str) -> anndata.AnnData:
    """Counts of a study's cells of common types, named in ``obs["label"]``."""
    cells = read_cells(data / f"{study}.h5ad")
    table = pd.read_csv(TABLES / "labels.csv").query("file == @study")
    [column] = table["column"].unique()
    given = types_by_markers(cells) if column == BY_MARKERS else cells.obs[column].astype(str).to_numpy()
    return named_cells(cells, given, table.set_index("from")["to"], study)


def types_by_markers(cells: anndata.AnnData) -> np.ndarray:
    """
    The type of every cell's cluster, [cells]; None where no type stands out.

    Of fine Leiden clusters each has the type whose marker genes are the highest in the mean, if they are high, and much
    higher than the next type's.
    """
    groups = leiden_groups(expression_pca(cells))
    values, genes = log_normalize(cells)
    markers = pd.read_csv(TABLES / "markers.csv").set_index("type")["genes"].str.split()
    scores = {
        name: np.asarray(values[:, np.isin(genes, known)].mean(axis=1)).ravel()
        for name, known in markers.items()
        if np.isin(known, genes).any()
    }
    means = pd.DataFrame(scores).groupby(groups).mean()
    ranked = np.sort(means.to_numpy(), axis=1)
    clear = (ranked[:, -1] >= LEAST_EXPRESSION) & (ranked[:, -1] >= LEAST_RATIO * ranked[:, -2])
    return means.idxmax(axis=1).where(clear, None).loc[groups].to_numpy()


def joined(studies: list[anndata.AnnData], most_cells: int = MOST_CELLS) -> anndata.AnnData:
    """Some cells of each type in each study over the panel of these studies; genes that a study lacks are 0."""
    panel, parts = panel_of(studies, **PANEL_RULE), []
    for study in studies:
        rows = capped(study.obs[LABEL].to_numpy(), most_cells)
        matrix = align_genes(list(study.var_names), panel).apply(as_csr(study.X)[rows])
        parts.append(anndata.AnnData(matrix, obs=study.obs.iloc[rows], var=pd.DataFrame(index=panel)))
    return anndata.concat(parts)


def panel_of(studies: list[anndata.AnnData], min_cells: int, min_studies: int) -> list[str]:
    """Genes with a name that so many cells of so many studies express."""
    counts = pd.Series(0, index=sorted({gene for study in studies for gene in study.var_names}))
    for study in studies:
        expressed = np.asarray((study.X > 0).sum(axis=0)).ravel() >= min_cells
        counts[study.var_names[expressed]] += 1
    return named_genes(counts.index[counts >= min_studies].tolist())


def capped(labels: np.ndarray, most_cells: int = MOST_CELLS) -> np.ndarray:
    """Rows of at most `most_cells` cells of each type, by a fixed draw."""
    draw = pd.Series(np.random.default_rng(0).permutation(len(labels)))
    return np.flatnonzero(draw.groupby(labels).rank() <= most_cells)
