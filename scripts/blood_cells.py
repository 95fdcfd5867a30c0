"""Labelled cells of human blood for the annotator of blood: cohorts with labels, and studies named by marker genes."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from annotator_parts import LABEL, STUDY, named_cells
from make_mini import CARDS
from scbert.data.labels import find_labels
from scbert.data.read import log_normalize, read_cells
from scbert.inference.expression_pca import expression_pca
from scbert.inference.voting import leiden_groups
from scbert.tokenization import align_genes
from scbert.tokenization.expression_scbert import as_csr

# labels.csv: the cohorts' types by common names; markers.csv: genes that tell types, and kinds of a type
TABLES = CARDS / "scbert-mini-pbmc"
# file: what it is, licence of the repository it stood in
COHORTS = {
    "pbmc3k_10x": ("10x PBMC 3k, one healthy donor", "MIT"),
    "zheng_facs_pbmc": ("PBMC sorted by surface markers, Zheng 2017", "BSD-2"),
}
# without labels: their clusters are named by marker genes
BY_MARKERS = {
    "pbmc_10x_v2_v3_5p": ("10x PBMC of three chemistries", "GPL-2"),
    "pbmc_hao_speck": ("PBMC, 10x 3' v3, GSE164378", "GPL-2+"),
    "pbmc1k_citeseq_rna": ("10x PBMC 1k, CITE-seq", "BSD-3"),
    "pbmc_7studies_2k": ("PBMC of seven studies", "CC BY-SA"),
    "kang_pbmc_ctrl_stim": ("PBMC, half of them stimulated, GSE96583", "GPL-3"),
    "pbmc_frozen_donor_a": ("10x frozen PBMC, donor A", "GPL-3"),
    "pbmc_pisces_1k": ("10x PBMC 1k", "10x"),
    "pbmc_eccite_500": ("PBMC, ECCITE-seq, GSE126310", "GPL-3"),
}
LABEL_KEY = "cell_type"
# a batch is clustered by itself, if it is large enough
BATCHES = {
    "pbmc_10x_v2_v3_5p": "batch",
    "pbmc_7studies_2k": "dataset",
    "kang_pbmc_ctrl_stim": "condition",
}
FEWEST_CELLS = 40
# a cluster is of the type whose markers it has at half of that type's best cluster at least, and by so much more than
# those of any other type; log1p CP10k below `LEAST_EXPRESSION` is no best
LEAST_SHARE, LEAST_RATIO, LEAST_EXPRESSION = 0.5, 1.25, 0.3
# log1p CP10k of the markers of CD8 T cells below which a cluster of T cells is CD4, and from which it is CD8
CD4, CD8 = 0.15, 0.7
# how much more of its markers a cluster of monocytes of one kind has than of the other's
MONOCYTE_RATIO = 1.3
NOT_BLOOD, LEUKOCYTE_GENE = "not a blood cell", "PTPRC"


def read_cohort(data: Path, study: str) -> anndata.AnnData:
    """Counts of a cohort's labelled cells, under the names of labels.csv."""
    cells = read_cells(data / f"{study}.h5ad")
    names = pd.read_csv(TABLES / "labels.csv").set_index("from")["to"]
    return named_cells(cells, find_labels(cells.obs, LABEL_KEY, study), names, study)


def read_by_markers(data: Path, study: str) -> anndata.AnnData:
    """Counts of the cells of a study without labels that marker genes name."""
    cells = read_cells(data / f"{study}.h5ad")
    batches = np.zeros(cells.n_obs) if study not in BATCHES else cells.obs[BATCHES[study]].to_numpy()
    types = np.full(cells.n_obs, None, dtype=object)
    for batch in np.unique(batches):
        rows = np.flatnonzero(batches == batch)
        if len(rows) >= FEWEST_CELLS:
            types[rows] = types_of_clusters(cells[rows].copy())
    learnt = set(pd.read_csv(TABLES / "labels.csv")["to"])
    return named_cells(cells, types, pd.Series({name: name for name in learnt}), study)


def types_of_clusters(cells: anndata.AnnData) -> np.ndarray:
    """The type of every cell's fine Leiden cluster, [cells]; None where no type or kind of a type stands out."""
    groups = leiden_groups(expression_pca(cells))
    values, genes = log_normalize(cells)
    table = pd.read_csv(TABLES / "markers.csv").set_index("type")
    levels = pd.DataFrame(
        {
            name: np.asarray(values[:, np.isin(genes, known.split())].mean(axis=1)).ravel()
            for name, known in table["genes"].items()
            if np.isin(genes, known.split()).any()
        }
    )
    means = levels.groupby(groups).mean()
    wide = means[[name for name in means if pd.isna(table["of"][name])]]
    shares = wide / wide.max().clip(lower=LEAST_EXPRESSION)
    ranked = np.sort(shares.to_numpy(), axis=1)
    clear = (ranked[:, -1] >= LEAST_SHARE) & (ranked[:, -1] >= LEAST_RATIO * ranked[:, -2])
    named = {group: kind_of(name, means.loc[group]) for group, name in shares.idxmax(axis=1)[clear].items()}
    return pd.Series(groups).map(named).astype(object).where(lambda found: found.notna(), None).to_numpy()


def kind_of(name: str, levels: pd.Series) -> str | None:
    """
    The kind of T cell or monocyte that a cluster of them is, by the means of its markers; None between two.

    Examples
    --------
    >>> kind_of("T cell", pd.Series({"CD8 T cell": 0.1})), kind_of("B cell", pd.Series())
    ('CD4 T cell', 'B cell')
    """
    if name == "T cell":
        level = levels["CD8 T cell"]
        return "CD8 T cell" if level >= CD8 else "CD4 T cell" if level <= CD4 else None
    if name == "monocyte":
        kinds = ("CD14+ monocyte", "FCGR3A+ monocyte")
        for kind, other in (kinds, kinds[::-1]):
            if levels[kind] > MONOCYTE_RATIO * levels[other]:
                return kind
        return None
    return name


def background(path: Path, genes: list[str]) -> anndata.AnnData:
    """Cells of another tissue over these genes, labelled as what they are not; those without PTPRC (CD45)."""
    cells = anndata.read_h5ad(path)
    counts = align_genes(list(cells.var_names), genes).apply(as_csr(cells.X))
    kept = np.flatnonzero(counts[:, genes.index(LEUKOCYTE_GENE)].toarray().ravel() == 0)
    obs = pd.DataFrame({LABEL: NOT_BLOOD, STUDY: path.stem}, index=cells.obs_names[kept])
    return anndata.AnnData(counts[kept], obs=obs, var=pd.DataFrame(index=genes))
