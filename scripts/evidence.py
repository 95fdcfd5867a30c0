"""
How the default recipe does on many studies, beside plain classifiers on the same cells and folds.

    python scripts/evidence.py CELLS --work build/evidence --half choose --cell-axes build/mini_choose
    python scripts/evidence.py CELLS --work build/evidence --half report --cell-axes build/mini/pretrained
    python scripts/evidence.py CELLS --work build/evidence --table docs/results_studies.md   # of what is there

CELLS is the folder of the labelled .h5ad files. It takes hours, and goes on where it stopped. The studies are in two
halves, named before anything was measured on them: all settings of the recipe were chosen on the first (CHOOSE). The
second (REPORT) was read more than once, after changes that the first had chosen (docs/results.md says which).
Protocols: 5-fold cross-validation (of at most 4,000 cells); leaving out a batch, donor or condition at a time;
few-shot with 1, 2, 5 and 10 cells a type (5 draws); from one cohort to another, and to studies of other chemistries
whose cells marker genes name (blood_cells.py); and types left out in turn. Every method is given the counts of the
same training cells and asked for the types of the same test cells whose type it was shown.

The default recipe knows two things from elsewhere, and both must come from other cells here. Axes of cells, with few
cells a type: no cell of the first half stands in scbert-mini's corpus; cells of the second do, so that half needs
another model, made without them (make_mini.py --leave-out, for the files in `IN_CORPUS`). And what studies differ in:
for each half a table without its studies and without those that are taught from (study_effects.py --model DIR
--without HALF; for the first half into a copy of scbert-mini's folder).
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from evidence_studies import HALVES, Task, folds_of, tasks
from evidence_tables import write_tables

GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass
class Answer:
    """Probabilities [cells, types], the types, and the confidence below which the method calls a cell unassigned."""

    probabilities: np.ndarray
    classes: np.ndarray
    threshold: float = 0.5


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


def plain(name: str) -> Callable[[Task], Answer]:
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
            return Answer(model.predict_proba(test), model.classes_)
        margins = model.decision_function(test)
        margins = np.stack([-margins, margins], axis=1) if margins.ndim == 1 else margins
        return Answer(softmax(margins, axis=1), model.classes_)

    return run


def inner_scores(name, strength, matrix, labels, folds):
    for fold in range(3):
        train = folds != fold
        if len(np.unique(labels[train])) > 1 and not train.all():
            model = fit_plain(name, strength, matrix[train], labels[train])
            yield f1_score(labels[~train], model.predict(matrix[~train]), average="macro", zero_division=0)


def baseline(name: str) -> Callable[[Task], Answer]:
    """One of the package's baselines."""

    def run(task: Task):
        from scbert.evaluation.baselines import BASELINES

        model = BASELINES[name](seed=0).fit(cells_of(task.matrix, task.labels), "label", input="counts")
        return Answer(model.predict_proba(cells_of(task.test), input="counts"), model.classes_)

    return run


def cells_of(
    matrix: sp.csr_matrix, labels: np.ndarray | None = None, genes: np.ndarray | None = None
) -> anndata.AnnData:
    cells = anndata.AnnData(matrix)
    cells.var_names = [f"GENE{number}" for number in range(matrix.shape[1])] if genes is None else genes
    if labels is not None:
        cells.obs["label"] = labels.astype(str)
    return cells


def scbert(task: Task, cell_axes: str | None = None) -> Answer:
    """
    The default recipe, as ``scbert finetune`` runs it, without the baseline that it measures beside itself.

    With the axes of cells of another pretrained model where one is named, and with none if that is "".
    """
    from transformers import set_seed

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
        "cell_axes": cell_axes,
    }
    _, data_arguments, model_arguments, training = parse(FINETUNE, {**given, "disable_tqdm": True})
    set_seed(training.seed)
    data = run_finetune.load(
        data_arguments, model_arguments, training, reference=cells_of(task.matrix, task.labels, task.genes)
    )
    model = run_finetune.build_model(model_arguments, data, training.seed)
    tuned = run_finetune.train(model, data, training)
    asked = cells_of(task.test, genes=task.genes)
    asked = asked if task.measured is None else asked[:, task.measured]
    bins = data.tokenizer.bin_cells(asked, input="counts")
    nowhere = np.zeros(bins.shape[0], dtype=np.int64)
    absent = data.tokenizer.align(asked).absent
    probabilities = tuned.probabilities_of(LabelledCells(bins, nowhere, nowhere, absent))
    threshold = model.config.unassigned_threshold
    classes = np.array(data.classes, dtype=object)
    return Answer(probabilities, classes, 0.5 if threshold is None else threshold)


METHODS: dict[str, Callable[[Task], Answer]] = {
    "scbert": scbert,
    "l2": plain("l2"),
    "svm": plain("svm"),
    "l1": plain("l1"),
    "knn": baseline("knn"),
    "celltypist": baseline("celltypist"),
}


def scores_of(answer: Answer, true: np.ndarray) -> dict[str, float]:
    """
    Accuracy, macro-F1 over the types among the test cells, and expected calibration error (15 bins).

    Where a type is among the test cells that was not shown: the accuracy of the others, and the share of novel cells
    called so (unassigned) of those that are novel or called so.
    """
    predicted, confidence = (
        answer.classes[answer.probabilities.argmax(axis=1)],
        answer.probabilities.max(axis=1),
    )
    novel, called = ~np.isin(true, answer.classes), confidence < answer.threshold
    if novel.any():
        known = ((predicted == true) & ~called)[~novel]
        found = (novel & called).sum() / (novel | called).sum()
        return {"known_accuracy": float(known.mean()), "novel_accuracy": float(found)}
    right, bins = predicted == true, np.minimum((confidence * 15).astype(int), 14)
    error = sum(
        abs(confidence[bins == number].mean() - right[bins == number].mean()) * (bins == number).mean()
        for number in np.unique(bins)
    )
    macro_f1 = f1_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0)
    return {"accuracy": float(right.mean()), "macro_f1": float(macro_f1), "ece": float(error)}


def result_path(work: Path, method: str, task: str) -> Path:
    return work / method / f"{hashlib.md5(task.encode()).hexdigest()}.json"


def run_all(
    folder: Path,
    work: Path,
    halves: list[str],
    methods: list[str],
    protocols: list[str],
    cell_axes: str | None = None,
) -> None:
    """Whatever is not there yet."""
    ways = METHODS | {"scbert": partial(scbert, cell_axes=cell_axes)}
    warnings.filterwarnings("ignore")
    for half in halves:
        for task in tasks(folder, half, protocols):
            for method in methods:
                path = result_path(work, method, task.name)
                if path.exists():
                    continue
                start = time.perf_counter()
                found = scores_of(ways[method](task), task.true)
                found |= {"task": task.name, "half": half, "seconds": time.perf_counter() - start}
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(found))
                os.replace(temporary, path)
                numbers = " ".join(f"{value:.3f}" for value in found.values() if isinstance(value, float))
                print(f"{method} {task.name} {numbers}", flush=True)


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="evidence", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, action="append", help="One half only.")
    parser.add_argument("--methods", default="scbert,l2,svm,l1,knn,celltypist")
    parser.add_argument("--protocols", default="cv5,group,few,cross,chemistry,novel")
    parser.add_argument(
        "--cell-axes", help="Pretrained model for the default recipe, in place of scbert-mini."
    )
    parser.add_argument("--table", type=Path, help="Write the tables of what is there, and run nothing.")
    options = parser.parse_args()
    if options.table:
        write_tables(options.work, options.table)
    else:
        halves, methods = options.half or list(HALVES), options.methods.split(",")
        if "scbert" in methods and (options.cell_axes is None or len(halves) > 1):
            parser.error(
                "scbert-mini knows what these studies differ in: run one --half at a time, and name with --cell-axes a "
                "folder that was made without its studies"
            )
        protocols = options.protocols.split(",")
        run_all(options.cells, options.work, halves, methods, protocols, options.cell_axes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
