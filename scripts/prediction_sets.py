"""
How often `scbert annotate --coverage 0.9` holds the true type, and how large its sets are.

    python scripts/prediction_sets.py CELLS                     # the table of docs/howto_annotate.md
    python scripts/prediction_sets.py CELLS --half report

Studies of the half that settings may be chosen on, or of the other (evidence_studies.py), at most 1,500 cells each:
five folds, and one batch, donor group or condition left out at a time, each annotated by a default model of the others.
"""

import argparse
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np

import evidence_studies
import scbert
from evidence_studies import HALVES, Task, cross_validation, left_out_groups, read_study

MAX_CELLS = 1500
# too few cells for folds, or hardly a second type in a fold
LEFT_OUT = (
    "fetal_cortex_camp",
    "oligodendroglioma_smartseq2",
    "ipsc_cardiac_timecourse",
    "marrow_blood_triana_250",
    "embryo_yan_counts",
)


def annotated_test(task: Task, **options) -> tuple[anndata.AnnData, list[str]]:
    """The test cells of a task, annotated by a default model of its other cells, and the types of the model."""
    names = [f"GENE{number}" for number in range(task.matrix.shape[1])]
    reference, query = anndata.AnnData(task.matrix), anndata.AnnData(task.test)
    reference.var_names = query.var_names = names
    reference.obs["cell_type"] = task.labels.astype(str)
    model = scbert.finetune(reference, "cell_type", input="counts", device="cpu", disable_tqdm=True)
    return model.annotate(query, input="counts", progress=False, **options), model.labels


def sets_of(task: Task, coverage: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the set of every test cell holds its type, and its size."""
    annotated, _ = annotated_test(task, coverage=coverage)
    sets = [text.split("|") if text else [] for text in annotated.obs["scbert_prediction_set"].astype(str)]
    held = np.array([label in types for label, types in zip(task.true, sets, strict=True)])
    return held, np.array([len(types) for types in sets])


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="prediction_sets", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--coverage", type=float, default=0.9)
    parser.add_argument("--half", choices=list(HALVES), default="choose")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    evidence_studies.MAX_CELLS = MAX_CELLS
    print(f"| `--coverage {options.coverage}` | cells | sets that hold the true type | mean size | empty |")
    print("|---|---:|---:|---:|---:|")
    for file, label_key, group in HALVES[options.half]:
        study = read_study(options.cells, file, label_key, group)
        folds = (
            () if file in LEFT_OUT else [sets_of(task, options.coverage) for task in cross_validation(study)]
        )
        rows = (
            [(study.name, tuple(np.concatenate(part) for part in zip(*folds, strict=True)))] if folds else []
        )
        # names of tasks end with the group
        rows += [
            (f"{study.name}, without {task.name.rpartition('|')[2]}", sets_of(task, options.coverage))
            for task in left_out_groups(study)
        ]
        for name, (held, size) in rows:
            shares = f"{held.mean():.1%} | {size.mean():.2f} | {(size == 0).mean():.1%}"
            print(f"| {name} | {len(held):,} | {shares} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
