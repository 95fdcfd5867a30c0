"""
What pretraining brings to the default recipe, by how many cells of a type are labelled.

    python scripts/pretraining_effect.py CELLS --work DIR --cell-axes OTHER
    python scripts/pretraining_effect.py CELLS --work DIR --half report --cell-axes OTHER/pretrained
    python scripts/pretraining_effect.py CELLS --work DIR --release model_cards/scbert-mini    # of what is there

CELLS is the folder of the labelled .h5ad files; studies and halves are those of evidence.py, and so is the pretrained
model that each half may be given: it knows nothing of its studies. The default recipe learns 1, 5, 10, 20 and 100 cells
a type (half of a type's cells at most) with what the model knows and without, and is asked for the same other cells (up
to 60 a type); 10 draws. What was done is not done again.
"""

import argparse
import json
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp, wilcoxon

from evidence import result_path, scbert, scores_of
from evidence_studies import HALVES, Study, Task, read_study
from make_mini import write_card

SHOTS, DRAWS, MOST_ASKED = (1, 5, 10, 20, 100), 10, 60
FEWEST_STUDIES = 6
WITH, WITHOUT = "pretrained", "not pretrained"
TITLES = {"choose": "that the recipe's settings were chosen on", "report": "that chose nothing"}


def draws(study: Study, shot: int) -> Iterator[Task]:
    """So many cells a type to learn; the cells asked for are the same whatever their number."""
    types = np.unique(study.labels)
    types = [name for name in types if (study.labels == name).sum() > 1]
    for draw in range(DRAWS):
        rng = np.random.default_rng(900 + draw)
        order = [rng.permutation(np.flatnonzero(study.labels == name)) for name in types]
        learnt = np.concatenate([cells[: min(shot, len(cells) // 2)] for cells in order])
        asked = np.concatenate([cells[len(cells) // 2 :][:MOST_ASKED] for cells in order])
        parts = (study.matrix[learnt], study.labels[learnt], study.matrix[asked], study.labels[asked])
        yield Task(f"{study.name}|shots{shot}|{draw}", *parts, genes=study.genes)


def run_all(folder: Path, work: Path, half: str, cell_axes: str | None) -> None:
    """Whatever is not there yet, few cells first."""
    warnings.filterwarnings("ignore")
    studies = [read_study(folder, *study) for study in HALVES[half]]
    for shot in SHOTS:
        for task in (task for study in studies for task in draws(study, shot)):
            for name, axes in ((WITH, cell_axes), (WITHOUT, "")):
                path = result_path(work, name, task.name)
                if path.exists():
                    continue
                found = scores_of(scbert(task, axes), task.true) | {"task": task.name, "half": half}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".partial").write_text(json.dumps(found))
                os.replace(path.with_suffix(".partial"), path)
                print(name, task.name, f"{found['macro_f1']:.3f}", flush=True)


def record_of(work: Path) -> list[dict[str, Any]]:
    """One row for each half, study and number of cells: macro-F1 of every draw that both did, with and without."""
    found = defaultdict(lambda: {WITH: {}, WITHOUT: {}})
    for name in (WITH, WITHOUT):
        for path in (work / name).glob("*.json"):
            result = json.loads(path.read_text())
            study, shots, draw = result["task"].split("|")
            key = (result["half"], study, int(shots.removeprefix("shots")))
            found[key][name][int(draw)] = round(result["macro_f1"], 4)
    rows = []
    for (half, study, shots), scores in sorted(found.items()):
        both = sorted(set(scores[WITH]) & set(scores[WITHOUT]))
        if len(both) > 1:
            values = {name: [scores[name][draw] for draw in both] for name in (WITH, WITHOUT)}
            rows.append({"half": half, "study": study, "shots": shots, **values})
    return rows


def section(rows: list[dict[str, Any]]) -> str:
    """A part of the card."""
    lines = [
        "## What pretraining brings to annotation",
        "",
        "`scbert finetune` with so many labelled cells a type, with what this model knows (axes of cells, where the "
        "median type has fewer than 50; what studies differ in) and without; it knew nothing of these studies (for "
        "those that chose nothing it was pretrained anew without them). "
        "Macro-F1 of cells not learnt from, 10 draws; better and worse: studies in which the draws differ by a paired "
        "t-test (p < 0.05); p: Wilcoxon's test over the studies "
        "(`python scripts/pretraining_effect.py`).",
        "",
    ]
    for half in sorted({row["half"] for row in rows}, reverse=True):
        of_half = [row for row in rows if row["half"] == half]
        lines += [
            f"Studies {TITLES[half]}:",
            "",
            "| cells a type | studies | without | with | difference | better | worse | p |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(line(shot, [row for row in of_half if row["shots"] == shot]) for shot in _shots(of_half)),
            "",
        ]
    return "\n".join(lines)


def _shots(rows: list[dict[str, Any]]) -> list[int]:
    """Those that enough studies for a test over them have been through."""
    shots = [row["shots"] for row in rows]
    return sorted(shot for shot in set(shots) if shots.count(shot) >= FEWEST_STUDIES)


def line(shots: int, rows: list[dict[str, Any]]) -> str:
    """A row of the table: means over the studies, the difference with its 95% interval over them."""
    pairs = np.array([[np.mean(row[name]) for name in (WITHOUT, WITH)] for row in rows])
    gains = pairs[:, 1] - pairs[:, 0]
    tests = [ttest_1samp(np.subtract(row[WITH], row[WITHOUT]), 0) for row in rows]
    better, worse = (
        sum(bool(test.pvalue < 0.05 and sign * test.statistic > 0) for test in tests) for sign in (1, -1)
    )
    half = student_t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5
    without, with_ = pairs.mean(axis=0)
    difference = f"{gains.mean():+.3f} ± {half:.3f}"
    scores = f"{without:.3f} | {with_:.3f} | {difference} | {better} | {worse}"
    return f"| {shots} | {len(rows)} | {scores} | {wilcoxon(gains).pvalue:.3f} |"


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        prog="pretraining_effect", description=__doc__.strip().partition("\n")[0]
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, default="choose")
    parser.add_argument("--cell-axes", help="Pretrained model, in place of scbert-mini.")
    parser.add_argument("--release", type=Path, help="Write the card of this folder, and run nothing.")
    options = parser.parse_args()
    if options.release:
        rows = record_of(options.work)
        (options.release / "fine_tuning.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.release / "card_3_fine_tuning.md").write_text(section(rows))
        write_card(options.release)
    elif options.cell_axes is None:
        parser.error(
            "scbert-mini knows what these studies differ in: name with --cell-axes a folder made without them"
        )
    else:
        run_all(options.cells, options.work, options.half, options.cell_axes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
