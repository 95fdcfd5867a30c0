"""
How the default recipe does on many studies, beside plain classifiers on the same cells and folds.

    python scripts/evidence.py CELLS --work build/evidence                 # all, hours: it goes on where it stopped
    python scripts/evidence.py CELLS --work build/evidence --half report --methods scbert --protocols few
    python scripts/evidence.py CELLS --work build/evidence --table docs/results/evidence.md   # of what is there

CELLS is the folder of the labelled .h5ad files. The studies are in two halves, named before anything was measured on
them: all settings of the recipe were chosen on the first (CHOOSE), the second (REPORT) was read once, at the end.
Protocols: 5-fold cross-validation (of at most 4,000 cells); leaving out a batch, donor or condition at a time; few-shot
with 1, 2, 5 and 10 cells a type (5 draws); and from one cohort to another. Every method is given the counts of the same
training cells and asked for the types of the same test cells whose type it was shown.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
from scipy.special import softmax
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

MAX_CELLS, MAX_FEW_SHOT_TESTS, SHOTS, DRAWS = 4000, 2000, (1, 2, 5, 10), 5
NO_LABEL = ("unassigned", "nan", "Unknown")
GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass
class Study:
    """Counts, labels and, where something tells batches apart, their names."""

    name: str
    matrix: sp.csr_matrix
    genes: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None


@dataclass
class Task:
    """Cells to learn from and cells to be asked for."""

    name: str
    matrix: sp.csr_matrix
    labels: np.ndarray
    test: sp.csr_matrix
    true: np.ndarray


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
HALVES = {"choose": CHOOSE, "report": REPORT}


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
        yield Task(f"{study.name}|cv5|{fold}", matrix[train], labels[train], matrix[test], labels[test])


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
            )


def cross_cohort(folder: Path, half: str) -> Iterator[Task]:
    """From one cohort to another, on the genes of the first."""
    for name, first, first_names, second, second_names in CROSS[half]:
        parts = []
        for file, names in ((first, first_names), (second, second_names)):
            cells = anndata.read_h5ad(folder / f"{file}.h5ad")
            labels = np.array([names.get(label, "") for label in cells.obs["cell_type"].astype(str)])
            parts.append((sp.csr_matrix(cells.X, dtype=np.float32), np.array(cells.var_names), labels))
        (matrix, genes, labels), (others, other_genes, true) = parts
        shared = sorted((set(labels) & set(true)) - {""})
        kept, asked = np.isin(labels, shared), np.isin(true, shared)
        yield Task(
            f"{name}|cross|0",
            matrix[kept],
            labels[kept],
            on_genes(others[asked], other_genes, genes),
            true[asked],
        )


def on_genes(matrix: sp.csr_matrix, genes: np.ndarray, wanted: np.ndarray) -> sp.csr_matrix:
    """Columns in another order, zero where a gene was not measured."""
    place = {gene: number for number, gene in enumerate(genes)}
    columns = np.array([place.get(gene, matrix.shape[1]) for gene in wanted])
    none = sp.csc_matrix((matrix.shape[0], 1), dtype=matrix.dtype)
    return sp.hstack([matrix.tocsc(), none], format="csc")[:, columns].tocsr()


PROTOCOLS = {"cv5": cross_validation, "group": left_out_groups, "few": few_shot}


def tasks(folder: Path, half: str, protocols: list[str]) -> Iterator[Task]:
    """All tasks of a half, study by study."""
    for study in HALVES[half]:
        cells = read_study(folder, *study)
        for name in protocols:
            if name in PROTOCOLS:
                yield from PROTOCOLS[name](cells)
    if "cross" in protocols:
        yield from cross_cohort(folder, half)


def log_cp10k(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """What the plain classifiers read."""
    matrix = matrix.copy()
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    totals[totals == 0] = 1
    scale = np.repeat(1e4 / totals, np.diff(matrix.indptr)).astype(np.float32)
    matrix.data = np.log1p(matrix.data * scale).astype(np.float32)
    return matrix


def fit_plain(name: str, strength: float, matrix: sp.csr_matrix, labels: np.ndarray):
    """Logistic regression with L1 (one against the rest) or L2 (multinomial), or a linear support vector machine."""
    if name == "l1":
        one = LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", max_iter=200, random_state=0)
        return OneVsRestClassifier(one).fit(matrix, labels)
    if name == "l2":
        return LogisticRegression(C=strength, max_iter=300).fit(matrix, labels)
    return LinearSVC(C=strength / 10, max_iter=2000, random_state=0).fit(matrix, labels)


def plain(name: str) -> Callable[[Task], tuple[np.ndarray, np.ndarray]]:
    """A classifier on log1p CP10k of the expressed genes, its strength by 3 inner folds on macro-F1."""

    def run(task: Task):
        matrix, test = log_cp10k(task.matrix), log_cp10k(task.test)
        seen = np.bincount(matrix.indices, minlength=matrix.shape[1]) > 0
        matrix, test, labels = matrix[:, seen], test[:, seen], task.labels
        strength = 1.0
        if len(labels) >= 2 * len(np.unique(labels)):
            folds = folds_of(labels, 3, 1)
            scores = {C: np.mean(list(inner_scores(name, C, matrix, labels, folds))) for C in GRID}
            strength = max(GRID, key=lambda C: (scores[C], -C))
        model = fit_plain(name, strength, matrix, labels)
        if hasattr(model, "predict_proba"):
            return model.predict_proba(test), model.classes_
        margins = model.decision_function(test)
        margins = np.stack([-margins, margins], axis=1) if margins.ndim == 1 else margins
        return softmax(margins, axis=1), model.classes_

    return run


def inner_scores(name, strength, matrix, labels, folds):
    for fold in range(3):
        train = folds != fold
        if len(np.unique(labels[train])) > 1 and not train.all():
            model = fit_plain(name, strength, matrix[train], labels[train])
            yield f1_score(labels[~train], model.predict(matrix[~train]), average="macro", zero_division=0)


def baseline(name: str) -> Callable[[Task], tuple[np.ndarray, np.ndarray]]:
    """One of the package's baselines."""

    def run(task: Task):
        from scbert.evaluation.baselines import BASELINES

        model = BASELINES[name](seed=0).fit(cells_of(task.matrix, task.labels), "label", input="counts")
        return model.predict_proba(cells_of(task.test), input="counts"), model.classes_

    return run


def cells_of(matrix: sp.csr_matrix, labels: np.ndarray | None = None) -> anndata.AnnData:
    cells = anndata.AnnData(matrix)
    cells.var_names = [f"GENE{number}" for number in range(matrix.shape[1])]
    if labels is not None:
        cells.obs["label"] = labels.astype(str)
    return cells


def scbert(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The default recipe, as ``scbert finetune`` runs it, without the baseline that it measures beside itself."""
    from scbert.training import run_finetune
    from scbert.training.finetune_arguments import FINETUNE
    from scbert.training.finetune_data import LabelledCells
    from scbert.training.settings import parse

    given = {
        "reference": "cells",
        "label_key": "label",
        "output": "nowhere",
        "input": "counts",
        "device": "cpu",
    }
    _, data_arguments, model_arguments, training = parse(FINETUNE, {**given, "disable_tqdm": True})
    data = run_finetune.load(
        data_arguments, model_arguments, training, reference=cells_of(task.matrix, task.labels)
    )
    model = run_finetune.build_model(model_arguments, data, training.seed)
    tuned = run_finetune.train(model, data, training)
    bins = data.tokenizer.bin_cells(cells_of(task.test), input="counts")
    nowhere = np.zeros(bins.shape[0], dtype=np.int64)
    return tuned.probabilities_of(LabelledCells(bins, nowhere, nowhere)), np.array(data.classes, dtype=object)


METHODS: dict[str, Callable[[Task], tuple[np.ndarray, np.ndarray]]] = {
    "scbert": scbert,
    "l2": plain("l2"),
    "svm": plain("svm"),
    "l1": plain("l1"),
    "knn": baseline("knn"),
    "celltypist": baseline("celltypist"),
}


def scores_of(probabilities: np.ndarray, classes: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 over the types among the test cells, and expected calibration error (15 bins)."""
    predicted, confidence = classes[probabilities.argmax(axis=1)], probabilities.max(axis=1)
    right, bins = predicted == true, np.minimum((confidence * 15).astype(int), 14)
    error = sum(
        abs(confidence[bins == number].mean() - right[bins == number].mean()) * (bins == number).mean()
        for number in np.unique(bins)
    )
    macro_f1 = f1_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0)
    return {"accuracy": float(right.mean()), "macro_f1": float(macro_f1), "ece": float(error)}


def result_path(work: Path, method: str, task: str) -> Path:
    return work / method / f"{hashlib.md5(task.encode()).hexdigest()}.json"


def run_all(folder: Path, work: Path, halves: list[str], methods: list[str], protocols: list[str]) -> None:
    """Whatever is not there yet."""
    warnings.filterwarnings("ignore")
    for half in halves:
        for task in tasks(folder, half, protocols):
            for method in methods:
                path = result_path(work, method, task.name)
                if path.exists():
                    continue
                start = time.perf_counter()
                found = scores_of(*METHODS[method](task), task.true)
                found |= {"task": task.name, "half": half, "seconds": time.perf_counter() - start}
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(found))
                os.replace(temporary, path)
                print(f"{method} {task.name} {found['macro_f1']:.3f} {found['seconds']:.1f} s", flush=True)


def read_results(work: Path) -> dict[str, dict[str, dict]]:
    """Method -> task -> scores."""
    found = defaultdict(dict)
    for path in sorted(work.glob("*/*.json")):
        result = json.loads(path.read_text())
        found[path.parent.name][result["task"]] = result
    return found


def write_tables(work: Path, path: Path) -> None:
    """Markdown: for each half, macro-F1 by study and protocol beside the best plain classifier, then the means."""
    results = read_results(work)
    lines = ["<!-- written by scripts/evidence.py -->", ""]
    for half in ("report", "choose"):
        rows = rows_of(results, half)
        title = "that chose nothing" if half == "report" else "that settings were chosen on"
        lines += [f"## Studies {title}", "", *table(rows), "", *means(rows), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


PEERS = ("l2", "svm", "l1")


def rows_of(results: dict, half: str) -> list[dict]:
    """One for each study and protocol, over the tasks that we and at least one plain classifier did."""
    groups = defaultdict(list)
    for name, result in results["scbert"].items():
        if result["half"] == half:
            groups[tuple(name.split("|")[:2])].append(name)
    rows = []
    for (study, protocol), names in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        row = {"study": study, "protocol": protocol, "tasks": len(names), "scores": {}}
        for method in METHODS:
            if all(name in results[method] for name in names):
                row["scores"][method] = {
                    score: np.array([results[method][name][score] for name in names])
                    for score in ("accuracy", "macro_f1", "ece")
                }
        rows.append(row)
    return rows


def table(rows: list[dict]) -> list[str]:
    """Macro-F1 of all, the difference to the best plain one with its paired 95% interval, and ECE of ours."""
    shown = [name for name in METHODS if any(name in row["scores"] for row in rows)]
    lines = [f"| study | protocol | tasks | {' | '.join(shown)} | less the best plain | ECE |"]
    lines += ["|---|---|---|" + "---|" * (len(shown) + 2)]
    for row in rows:
        scores = row["scores"]
        cells = [f"{scores[name]['macro_f1'].mean():.3f}" if name in scores else "" for name in shown]
        lines.append(
            f"| {row['study']} | {row['protocol']} | {row['tasks']} | {' | '.join(cells)} | {difference(scores)} | "
            f"{scores['scbert']['ece'].mean():.3f} |"
        )
    return lines


def difference(scores: dict) -> str:
    """Ours less the best of the plain ones in the mean, paired by task."""
    peers = [name for name in PEERS if name in scores]
    if not peers:
        return ""
    best = max(peers, key=lambda name: scores[name]["macro_f1"].mean())
    gap = scores["scbert"]["macro_f1"] - scores[best]["macro_f1"]
    if len(gap) < 2:
        return f"{gap.mean():+.3f} ({best})"
    half = student_t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5
    return f"{gap.mean():+.3f} ± {half:.3f} ({best})"


def means(rows: list[dict]) -> list[str]:
    """Over studies, by protocol: macro-F1 and ECE of every method that did all of them."""
    lines = ["| protocol | studies | method | accuracy | macro-F1 | ECE |", "|---|---|---|---|---|---|"]
    for protocol in sorted({row["protocol"] for row in rows}):
        of_protocol = [row["scores"] for row in rows if row["protocol"] == protocol]
        for method in METHODS:
            if all(method in scores for scores in of_protocol):
                found = [
                    np.mean([scores[method][name].mean() for scores in of_protocol])
                    for name in ("accuracy", "macro_f1", "ece")
                ]
                numbers = " | ".join(f"{value:.3f}" for value in found)
                lines.append(f"| {protocol} | {len(of_protocol)} | {method} | {numbers} |")
    return lines


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="evidence", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, action="append", help="One half only.")
    parser.add_argument("--methods", default="scbert,l2,svm,l1,knn,celltypist")
    parser.add_argument("--protocols", default="cv5,group,few,cross")
    parser.add_argument("--table", type=Path, help="Write the tables of what is there, and run nothing.")
    options = parser.parse_args()
    if options.table:
        write_tables(options.work, options.table)
    else:
        halves = options.half or list(HALVES)
        run_all(options.cells, options.work, halves, options.methods.split(","), options.protocols.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())
