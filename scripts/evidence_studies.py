"""The studies that the default recipe is measured on, in two halves, and the tasks made of them; see evidence.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

from annotator_parts import LABEL
from blood_cells import read_by_markers, read_cohort

MAX_CELLS, MAX_FEW_SHOT_TESTS, MAX_NOVELTY_CELLS = 4000, 2000, 1000
SHOTS, DRAWS = (1, 2, 5, 10), 5
NO_LABEL = ("unassigned", "nan", "Unknown")


@dataclass
class Study:
    """Counts, labels and, where something tells batches apart, their names."""

    name: str
    matrix: sp.csr_matrix
    genes: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None


@dataclass
class Task:
    """Cells to learn from, cells to be asked for, and their genes; by mask, those that are measured in the latter."""

    name: str
    matrix: sp.csr_matrix
    labels: np.ndarray
    test: sp.csr_matrix
    true: np.ndarray
    measured: np.ndarray | None = None
    genes: np.ndarray | None = None


def quarters_of_donors(obs) -> np.ndarray:
    """Donors in four groups, by a fixed draw."""
    donors = obs["donor"].astype(str).to_numpy()
    names = np.unique(donors)
    drawn = np.random.default_rng(0).permutation(len(names))
    return np.array([str(drawn[np.searchsorted(names, donor)] % 4) for donor in donors])


def last_letter_of_batch(obs) -> np.ndarray:
    return np.array([batch[-1] for batch in obs["batch"].astype(str)])


# file, column of labels, what a group is
CHOOSE = (
    ("pbmc3k_10x", "cell_type", None),
    ("zheng_facs_pbmc", "cell_type", None),
    ("scmixology_celseq_dropseq", "cell_type", "dataset"),
    ("fetal_cortex_camp", "cell_type", None),
    ("pbmc_onek1k_40donors", "cell_type", quarters_of_donors),
    ("tcells_treg_tconv", "cell_type", "condition"),
    ("tissue_aj064_800", "cell_type", None),
    ("pancreas_beta_ductal_3batches", "cell_type", "batch"),
)
REPORT = (
    ("breast_tnbc_wu_cid4465", "cell_type", None),
    ("breast_tnbc_wu_cid4465", "cell_type_minor", None),
    ("oligodendroglioma_smartseq2", "cell_type", None),
    ("ipsc_cardiac_timecourse", "cell_type", None),
    ("brain_allen_acc_v1", "cell_type", "donor"),
    ("pbmc_child_sle_subsets", "cell_subtype", "condition"),
    ("celllines_hashed_4", "cell_type", last_letter_of_batch),
    ("marrow_blood_triana_250", "cell_type", "batch"),
    ("embryo_yan_counts", "cell_type", None),
    ("pbmc_symphony_2protocols", "cell_type", "batch"),
)
# names of two cohorts' types brought to common ones; types of one cohort only are left out
ZHENG = {
    "CD19+ B": "B",
    "CD56+ NK": "NK",
    "CD14+ Monocyte": "Mono",
    **dict.fromkeys(
        (
            "CD8+ Cytotoxic T",
            "CD4+ T Helper2",
            "CD4+/CD45RO+ Memory",
            "CD8+/CD45RA+ Naive Cytotoxic",
            "CD4+/CD25 T Reg",
            "CD4+/CD45RA+/CD25- Naive T",
        ),
        "T",
    ),
}
PBMC3K_COARSE = {
    "Naive CD4 T": "T",
    "Memory CD4 T": "T",
    "CD8 T": "T",
    "CD14+ Mono": "Mono",
    "FCGR3A+ Mono": "Mono",
    "B": "B",
    "NK": "NK",
}
SYMPHONY = {
    "T_CD4": "CD4",
    "T_CD8": "CD8",
    "Mono_CD14": "Mono14",
    "Mono_CD16": "Mono16",
    "B": "B",
    "NK": "NK",
    "DC": "DC",
    "MK": "MK",
}
PBMC3K_FINE = {
    "Naive CD4 T": "CD4",
    "Memory CD4 T": "CD4",
    "CD8 T": "CD8",
    "CD14+ Mono": "Mono14",
    "FCGR3A+ Mono": "Mono16",
    "B": "B",
    "NK": "NK",
    "DC": "DC",
    "Platelet": "MK",
}
CROSS = {
    "choose": (
        ("pbmc3k>zheng", "pbmc3k_10x", PBMC3K_COARSE, "zheng_facs_pbmc", ZHENG),
        ("zheng>pbmc3k", "zheng_facs_pbmc", ZHENG, "pbmc3k_10x", PBMC3K_COARSE),
    ),
    "report": (
        ("symphony>pbmc3k", "pbmc_symphony_2protocols", SYMPHONY, "pbmc3k_10x", PBMC3K_FINE),
        ("pbmc3k>symphony", "pbmc3k_10x", PBMC3K_FINE, "pbmc_symphony_2protocols", SYMPHONY),
    ),
}
# cohorts that teach, the studies they are asked for, and what their types are called in common
COHORTS = ("pbmc3k_10x", "zheng_facs_pbmc")
MARKED = {
    "choose": ("pbmc_10x_v2_v3_5p", "pbmc1k_citeseq_rna", "kang_pbmc_ctrl_stim", "pbmc_eccite_500"),
    "report": ("pbmc_hao_speck", "pbmc_7studies_2k", "pbmc_pisces_1k", "pbmc_frozen_donor_a"),
}
BROAD = {
    "CD4 T cell": "T cell",
    "CD8 T cell": "T cell",
    "CD14+ monocyte": "monocyte",
    "FCGR3A+ monocyte": "monocyte",
}
HALVES = {"choose": CHOOSE, "report": REPORT}
# files of scbert-mini's corpus with cells of the second half; the last shares 67 of them
IN_CORPUS = (
    "breast_tnbc_wu_cid4465",
    "oligodendroglioma_smartseq2",
    "ipsc_cardiac_timecourse",
    "embryo_yan_counts",
    "pbmc_10x_v2_v3_5p",
)
# studies that must not be in the table of what studies differ in (study_effects.py --without): those of the half,
# and both cohorts that are taught from
NOT_IN_EFFECTS = {
    "choose": (
        *COHORTS,
        *MARKED["choose"],
        "skin_ctcl_gse128531",
        "malt_lymphoma_streak",
        "breast_tumor_copykat",
        "scmixology_celseq_dropseq",
        "fetal_cortex_camp",
    ),
    "report": (
        *COHORTS,
        *MARKED["report"],
        "pbmc_10x_v2_v3_5p",
        "breast_tnbc_wu_cid4465",
        "oligodendroglioma_smartseq2",
    ),
}


def read_study(folder: Path, file: str, label_key: str, group) -> Study:
    """Labelled cells of a file."""
    cells = anndata.read_h5ad(folder / f"{file}.h5ad")
    labels = cells.obs[label_key].astype(str).to_numpy()
    cells, labels = cells[~np.isin(labels, NO_LABEL)], labels[~np.isin(labels, NO_LABEL)]
    groups = None
    if group is not None:
        groups = group(cells.obs) if callable(group) else cells.obs[group].astype(str).to_numpy()
    name = file if label_key == "cell_type" else f"{file}.{label_key}"
    return Study(name, sp.csr_matrix(cells.X, dtype=np.float32), np.array(cells.var_names), labels, groups)


def folds_of(labels: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """A fold for every cell, every class spread over them."""
    rng, folds = np.random.default_rng(seed), np.zeros(len(labels), int)
    for place, name in enumerate(np.unique(labels)):
        cells = rng.permutation(np.flatnonzero(labels == name))
        folds[cells] = (np.arange(len(cells)) + place) % n_folds
    return folds


def cross_validation(study: Study) -> Iterator[Task]:
    """Five folds of at most `MAX_CELLS`."""
    cells = np.arange(len(study.labels))
    if len(cells) > MAX_CELLS:
        cells = np.random.default_rng(0).permutation(cells)[:MAX_CELLS]
    matrix, labels = study.matrix[cells], study.labels[cells]
    folds = folds_of(labels, 5, 0)
    for fold in range(5):
        train = folds != fold
        test = ~train & np.isin(labels, labels[train])
        name = f"{study.name}|cv5|{fold}"
        yield Task(name, matrix[train], labels[train], matrix[test], labels[test], genes=study.genes)


def left_out_groups(study: Study) -> Iterator[Task]:
    """Each batch, donor or condition in turn, where at least 20 cells of two known types are in it."""
    if study.groups is None:
        return
    for group in np.unique(study.groups):
        train = study.groups != group
        test = ~train & np.isin(study.labels, study.labels[train])
        types = [len(np.unique(study.labels[part])) for part in (train, test)]
        if test.sum() < 20 or min(types) < 2:
            continue
        cells = np.flatnonzero(train)
        if len(cells) > MAX_CELLS:
            cells = np.random.default_rng(0).permutation(cells)[:MAX_CELLS]
        yield Task(
            f"{study.name}|group|{group}",
            study.matrix[cells],
            study.labels[cells],
            study.matrix[test],
            study.labels[test],
            genes=study.genes,
        )


def few_shot(study: Study) -> Iterator[Task]:
    """So many cells a type, the same test cells for all; of a type with few cells all but one."""
    types = np.unique(study.labels)
    for draw in range(DRAWS):
        rng = np.random.default_rng(100 + draw)
        order = {name: rng.permutation(np.flatnonzero(study.labels == name)) for name in types}
        test = np.concatenate([order[name][min(10, len(order[name]) - 1) :] for name in types])
        if len(test) > MAX_FEW_SHOT_TESTS:
            test = np.random.default_rng(1).permutation(test)[:MAX_FEW_SHOT_TESTS]
        for shot in SHOTS:
            train = np.concatenate([order[name][: min(shot, max(1, len(order[name]) - 1))] for name in types])
            yield Task(
                f"{study.name}|few{shot}|{draw}",
                study.matrix[train],
                study.labels[train],
                study.matrix[test],
                study.labels[test],
                genes=study.genes,
            )


def left_out_types(study: Study) -> Iterator[Task]:
    """Up to eight types of 8 cells or more, each in turn unknown; a fifth of the others' cells is asked for, too."""
    cells = np.arange(len(study.labels))
    if len(cells) > MAX_NOVELTY_CELLS:
        cells = np.random.default_rng(2).permutation(cells)[:MAX_NOVELTY_CELLS]
    matrix, labels = study.matrix[cells], study.labels[cells]
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 4:
        return
    held = folds_of(labels, 5, 3) == 0
    for name in names[counts >= 8][:8]:
        train, novel = ~held & (labels != name), labels == name
        test = novel | (held & np.isin(labels, labels[train]))
        known = (matrix[train], labels[train])
        yield Task(f"{study.name}|novel|{name}", *known, matrix[test], labels[test], genes=study.genes)


def cross_cohort(folder: Path, half: str) -> Iterator[Task]:
    """From one cohort to another."""
    for name, *pair in CROSS[half]:
        parts = []
        for file, names in (pair[:2], pair[2:]):
            cells = anndata.read_h5ad(folder / f"{file}.h5ad")
            labels = np.array([names.get(label, "") for label in cells.obs["cell_type"].astype(str)])
            parts.append(
                Study(file, sp.csr_matrix(cells.X, dtype=np.float32), np.array(cells.var_names), labels)
            )
        yield from_to(f"{name}|cross|0", *parts)


def other_chemistries(folder: Path, half: str) -> Iterator[Task]:
    """From a cohort of the first chemistry of 10x to studies of others, whose cells marker genes name."""
    asked = [broad_types(read_by_markers(folder, study), study) for study in MARKED[half]]
    for cohort in COHORTS:
        known = broad_types(read_cohort(folder, cohort), cohort)
        for study in asked:
            yield from_to(f"{cohort}>{study.name}|chemistry|0", known, study)


def broad_types(cells: anndata.AnnData, name: str) -> Study:
    """A study whose T cells and monocytes are of one type each: which kind, marker genes do not tell surely."""
    labels = cells.obs[LABEL].replace(BROAD).to_numpy().astype(str)
    return Study(name, sp.csr_matrix(cells.X, dtype=np.float32), np.array(cells.var_names), labels)


def from_to(name: str, first: Study, second: Study) -> Task:
    """To learn the one's cells and be asked for the other's, of the types of both, on the genes of the first."""
    shared = sorted((set(first.labels) & set(second.labels)) - {""})
    kept, asked = np.isin(first.labels, shared), np.isin(second.labels, shared)
    return Task(
        name,
        first.matrix[kept],
        first.labels[kept],
        on_genes(second.matrix[asked], second.genes, first.genes),
        second.labels[asked],
        np.isin(first.genes, second.genes),
        first.genes,
    )


def on_genes(matrix: sp.csr_matrix, genes: np.ndarray, wanted: np.ndarray) -> sp.csr_matrix:
    """Columns in another order, zero where a gene was not measured."""
    place = {gene: number for number, gene in enumerate(genes)}
    columns = np.array([place.get(gene, matrix.shape[1]) for gene in wanted])
    none = sp.csc_matrix((matrix.shape[0], 1), dtype=matrix.dtype)
    return sp.hstack([matrix.tocsc(), none], format="csc")[:, columns].tocsr()


PROTOCOLS = {
    "cv5": cross_validation,
    "group": left_out_groups,
    "few": few_shot,
    "novel": left_out_types,
}


def tasks(folder: Path, half: str, protocols: list[str]) -> Iterator[Task]:
    """All tasks of a half, study by study."""
    for study in HALVES[half]:
        cells = read_study(folder, *study)
        for name in protocols:
            if name in PROTOCOLS:
                yield from PROTOCOLS[name](cells)
    if "cross" in protocols:
        yield from cross_cohort(folder, half)
    if "chemistry" in protocols:
        yield from other_chemistries(folder, half)
