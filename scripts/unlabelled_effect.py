"""
What cells without labels bring, beside plain methods that are given the same cells.

    python scripts/unlabelled_effect.py CELLS --work build/unlabelled --half choose --cell-axes build/mini_choose
    python scripts/unlabelled_effect.py CELLS --work build/unlabelled --half report --cell-axes build/mini/pretrained
    python scripts/unlabelled_effect.py CELLS --work build/unlabelled --table docs/results_unlabelled.md

CELLS is the folder of the labelled .h5ad files; studies and their halves are those of evidence.py. Few labelled cells a
type and, without labels, up to 1,000 cells that are asked for (3 draws); then, where something tells batches apart, the
cells asked for are another batch, donor or condition than the labelled ones. What was done is not done again.

The plain methods are logistic regressions, their strength chosen by inner folds where a type has two cells: on log1p
CP10k of the genes, on 50 principal axes of all cells, on expression averaged over 15 neighbours among all cells (in
these axes), and self-trained (scikit-learn's, threshold 0.75).
"""

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.semi_supervised import SelfTrainingClassifier
from transformers import set_seed

from evidence import GRID, cells_of, inner_scores, log_cp10k
from evidence_studies import HALVES, Study, Task, cross_cohort, folds_of, read_study
from scbert.training import run_finetune
from scbert.training.finetune_arguments import FINETUNE
from scbert.training.finetune_data import LabelledCells
from scbert.training.principal_axes import axes_of_cells
from scbert.training.settings import parse
from scbert.training.unlabelled_cells import neighbour_means

SHOTS, SHIFT_SHOTS, DRAWS, MAX_QUERY, AXES = (1, 5, 10), (5, 50), 3, 1000, 50
TITLES = {
    "lr": "LR",
    "lr_axes": "LR, joint axes",
    "lr_neighbours": "LR, neighbours",
    "lr_self": "LR, self-trained",
    "scbert": "scbert",
    "scbert_unlabelled": "scbert, unlabelled",
}


def few_labelled(study: Study) -> Iterator[Task]:
    """So many labelled cells a type; of the others some are asked for, the same for all numbers."""
    types = np.unique(study.labels)
    for draw in range(DRAWS):
        rng = np.random.default_rng(700 + draw)
        order = {name: rng.permutation(np.flatnonzero(study.labels == name)) for name in types}
        asked = np.concatenate([order[name][min(10, len(order[name]) - 1) :] for name in types])
        asked = rng.permutation(asked)[:MAX_QUERY]
        for shot in SHOTS:
            learnt = np.concatenate(
                [order[name][: min(shot, max(1, len(order[name]) - 1))] for name in types]
            )
            yield task_of(study, f"few{shot}|{draw}", learnt, asked)


def other_batches(study: Study) -> Iterator[Task]:
    """Labelled cells of all batches but one, and that one asked for."""
    names = [] if study.groups is None else np.unique(study.groups)[:DRAWS]
    for name in names:
        learnt = np.flatnonzero(study.groups != name)
        asked = np.flatnonzero((study.groups == name) & np.isin(study.labels, study.labels[learnt]))
        if len(asked) >= 20 and len(np.unique(study.labels[asked])) > 1:
            yield from shifted(study, f"|{name}", learnt, asked)


def shifted(study: Study, name: str, learnt: np.ndarray, asked: np.ndarray) -> Iterator[Task]:
    rng = np.random.default_rng(0)
    asked, learnt = rng.permutation(asked)[:MAX_QUERY], rng.permutation(learnt)
    for shot in SHIFT_SHOTS:
        types = np.unique(study.labels[learnt])
        some = np.concatenate([learnt[study.labels[learnt] == kind][:shot] for kind in types])
        yield task_of(study, f"shift{shot}{name}", some, asked)


def task_of(study: Study, name: str, learnt: np.ndarray, asked: np.ndarray) -> Task:
    return Task(
        f"{study.name}|{name}",
        study.matrix[learnt],
        study.labels[learnt],
        study.matrix[asked],
        study.labels[asked],
        genes=study.genes,
    )


def tasks(folder: Path, half: str) -> Iterator[Task]:
    """All tasks of a half."""
    for study in HALVES[half]:
        cells = read_study(folder, *study)
        yield from few_labelled(cells)
        yield from other_batches(cells)
    for task in cross_cohort(folder, half):
        both = sp.vstack([task.matrix, task.test]).tocsr()
        cohorts = Study(task.name.split("|")[0], both, task.genes, np.append(task.labels, task.true), None)
        yield from shifted(cohorts, "|0", *np.split(np.arange(both.shape[0]), [len(task.labels)]))


def plain_answers(task: Task) -> dict[str, np.ndarray]:
    """Labels of the cells asked for by each plain method."""
    n_labelled = len(task.labels)
    cells = log_cp10k(sp.vstack([task.matrix, task.test]).tocsr())
    # ridge regression on all of its principal axes is ridge regression on the genes
    own = axes_of_cells(cells, np.arange(cells.shape[0]) < n_labelled).coordinates
    joint = axes_of_cells(cells, rank=min(AXES, cells.shape[0] - 1)).coordinates
    means = neighbour_means(cells, joint)
    smooth = axes_of_cells(means, np.arange(cells.shape[0]) < n_labelled).coordinates
    every = axes_of_cells(cells, rank=min(400, cells.shape[0] - 1)).coordinates
    answers = {
        name: fitted(coordinates[:n_labelled], task.labels).predict(coordinates[n_labelled:])
        for name, coordinates in (("lr", own), ("lr_axes", joint), ("lr_neighbours", smooth))
    }
    types, index = np.unique(task.labels, return_inverse=True)
    model = SelfTrainingClassifier(LogisticRegression(max_iter=100), threshold=0.75)
    model.fit(every, np.append(index, np.full(len(task.true), -1)))
    answers["lr_self"] = types[model.predict(every[n_labelled:])]
    return answers


def fitted(coordinates: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """Logistic regression, its strength by 3 inner folds on macro-F1 where a type has two cells."""
    strength = 1.0
    if len(labels) >= 2 * len(np.unique(labels)):
        folds = folds_of(labels, 3, 1)
        scores = {C: np.mean(list(inner_scores("l2", C, coordinates, labels, folds))) for C in GRID}
        strength = max(GRID, key=lambda C: (scores[C], -C))
    return LogisticRegression(C=strength, max_iter=300).fit(coordinates, labels)


def scbert_answer(task: Task, unlabelled: bool, cell_axes: str | None) -> tuple[np.ndarray, dict]:
    """Labels by the default recipe, as ``scbert finetune`` runs it, and what it says of the unlabelled cells."""
    given = {"reference": "cells", "label_key": "label", "output": "nowhere", "input": "counts"}
    _, data, model, training = parse(
        FINETUNE, given | {"cell_axes": cell_axes, "device": "cpu", "disable_tqdm": True}
    )
    set_seed(training.seed)
    query = cells_of(task.test, genes=task.genes)
    found = run_finetune.load(
        data,
        model,
        training,
        reference=cells_of(task.matrix, task.labels, task.genes),
        unlabelled=[query] if unlabelled else [],
    )
    tuned = run_finetune.train(run_finetune.build_model(model, found, training.seed), found, training)
    bins = found.tokenizer.bin_cells(query, input="counts")
    nowhere = np.zeros(bins.shape[0], dtype=np.int64)
    best = tuned.probabilities_of(LabelledCells(bins, nowhere, nowhere)).argmax(axis=1)
    return np.array(found.classes)[best], tuned.held_out.report.get("unlabelled", {})


def run(task: Task, cell_axes: str | None = None) -> dict:
    """Accuracy and macro-F1 of all methods."""
    answers = plain_answers(task)
    answers["scbert"], _ = scbert_answer(task, False, cell_axes)
    answers["scbert_unlabelled"], told = scbert_answer(task, True, cell_axes)
    scores = {
        name: {
            "accuracy": float((answer == task.true).mean()),
            "macro_f1": f1_score(
                task.true, answer, labels=np.unique(task.true), average="macro", zero_division=0
            ),
        }
        for name, answer in answers.items()
    }
    return {"task": task.name, "scores": scores, "told": told}


def run_all(folder: Path, work: Path, halves: list[str], cell_axes: str | None) -> None:
    """Whatever is not there yet."""
    warnings.filterwarnings("ignore")
    for half in halves:
        for task in tasks(folder, half):
            path = work / half / f"{hashlib.md5(task.name.encode()).hexdigest()}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(run(task, cell_axes)))
                os.replace(temporary, path)
                print(task.name, flush=True)


def write_tables(work: Path, path: Path) -> None:
    """Markdown: for each half, means by number of labelled cells, then every study."""
    lines = ["# What cells without labels bring", "", "<!-- written by scripts/unlabelled_effect.py -->", ""]
    lines += [
        "Accuracy / macro-F1; few: labelled cells a type; shift: the cells asked for are another batch,"
    ]
    lines += [
        "donor, condition or cohort. `python scripts/unlabelled_effect.py CELLS --work W --half choose` (and `report`)",
        "does it again, with `--cell-axes` that know nothing of these studies (`scripts/evidence.py` tells how).",
        "",
    ]
    for half, title in (("report", "that chose nothing"), ("choose", "that settings were chosen on")):
        groups = defaultdict(list)
        for file in sorted((work / half).glob("*.json")):
            result = json.loads(file.read_text())
            study, kind = result["task"].split("|")[:2]
            groups[kind, study].append(result["scores"])
        kinds = [f"few{shot}" for shot in SHOTS] + [f"shift{shot}" for shot in SHIFT_SHOTS]
        lines += [f"## Studies {title}", "", *heading("labelled cells a type", "studies")]
        for kind in kinds:
            found = [means(scores) for (of, _), scores in groups.items() if of == kind]
            if found:
                lines.append(row([kind, str(len(found))], np.mean(found, axis=0)))
        lines += ["", *heading("labelled cells a type", "study")]
        for kind in kinds:
            lines += [
                row([kind, study], means(groups[of, study])) for of, study in sorted(groups) if of == kind
            ]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def means(results: list[dict]) -> np.ndarray:
    """[methods, 2]."""
    return np.mean([[[r[name]["accuracy"], r[name]["macro_f1"]] for name in TITLES] for r in results], axis=0)


def heading(*first: str) -> list[str]:
    names = [*first, *TITLES.values()]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def row(first: list[str], scores: np.ndarray) -> str:
    return "| " + " | ".join([*first, *(f"{accuracy:.3f} / {f1:.3f}" for accuracy, f1 in scores)]) + " |"


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="unlabelled_effect", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, action="append", help="One half only.")
    parser.add_argument("--cell-axes", help="Pretrained model for the default recipe; see evidence.py.")
    parser.add_argument("--table", type=Path, help="Write the tables of what is there, and run nothing.")
    options = parser.parse_args()
    if options.table:
        write_tables(options.work, options.table)
    else:
        halves = options.half or list(HALVES)
        if options.cell_axes is None or len(halves) > 1:
            parser.error(
                "scbert-mini knows what these studies differ in: run one --half at a time, and name with --cell-axes a "
                "folder that was made without its studies"
            )
        run_all(options.cells, options.work, halves, options.cell_axes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
