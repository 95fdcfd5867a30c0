"""
Time of the default fine-tuning beside scikit-learn's logistic regression with a search of the same size, in one run.

    python benchmarks/finetune_speed.py                                     # the demo's 700 cells
    python benchmarks/finetune_speed.py REFERENCE.h5ad --label-key cell_type --values counts
    python benchmarks/finetune_speed.py REFERENCE.h5ad --cells 50000 --alone --rounds 1

Ours is ``scbert finetune`` as a user runs it from Python, on all cells: reading, cross-fitting, novelty, the baseline
that it measures, the folder written. The peer is what a careful user would do to learn as much: scikit-learn's
`LogisticRegression` (L2, multinomial) on log1p CP10k, seven strengths by five folds, then a fit on all cells. The ways
take turns; quote the ratios.

With ``--cells`` the reference is as large as an atlas: its cells drawn with replacement, a random part of each one's
counts left out. That is for time and memory; the score means nothing, since a cell's copies are in several folds.
"""

import argparse
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from scbert.data.read import log_normalize
from scbert.inference.demo import LABEL_KEY, demo_cells
from scbert.training.run_finetune import finetune

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def ours(path: Path, label_key: str, values: str) -> dict[str, float]:
    """Seconds, and the estimate of the macro-F1."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        summary = finetune(
            path, label_key, Path(folder) / "model", input=values, device="cpu", disable_tqdm=True
        )
        return {
            "seconds": time.perf_counter() - start,
            "macro_f1": summary["cross_validation_macro_f1"],
        }


def scikit_learn(path: Path, label_key: str, values: str) -> dict[str, float]:
    """The same of scikit-learn, by two processes."""
    start = time.perf_counter()
    cells = anndata.read_h5ad(path)
    labels = cells.obs[label_key].astype(str).to_numpy()
    labelled = ~np.isin(labels, ["nan", "unassigned"])
    matrix, _ = log_normalize(cells[labelled], input=values)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(
        LogisticRegression(max_iter=300), {"C": STRENGTHS}, scoring="f1_macro", cv=folds, n_jobs=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search.fit(matrix, labels[labelled])
    return {"seconds": time.perf_counter() - start, "macro_f1": float(search.best_score_)}


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="finetune_speed", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--values", choices=("auto", "counts", "log1p"), default="auto")
    parser.add_argument("--cells", type=int, help="of a reference of counts, draw so many, thinned")
    parser.add_argument("--alone", action="store_true", help="without scikit-learn beside it")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = (options.reference, options.label_key, options.values)
        if options.reference is None:
            job = (Path(folder) / "cells.h5ad", LABEL_KEY, "log1p")
            demo_cells().write_h5ad(job[0])
        elif options.cells:
            job = (Path(folder) / "cells.h5ad", options.label_key, "counts")
            drawn_cells(options.reference, options.cells).write_h5ad(job[0])
        take_turns(job, options.rounds, options.alone)
    return 0


def drawn_cells(path: Path, n_cells: int) -> anndata.AnnData:
    """So many cells of a file, drawn with replacement, each with 60 to 95% of its counts."""
    rng, cells = np.random.default_rng(0), anndata.read_h5ad(path)
    rows = rng.integers(0, cells.n_obs, n_cells)
    counts = sp.csr_matrix(cells.X)[rows]
    shares = np.repeat(rng.uniform(0.6, 0.95, n_cells), np.diff(counts.indptr))
    counts.data = rng.binomial(np.rint(counts.data).astype(np.int64), shares).astype(np.float32)
    counts.eliminate_zeros()
    obs = cells.obs.iloc[rows].set_axis([f"cell_{number}" for number in range(n_cells)])
    return anndata.AnnData(counts, obs, cells.var)


def take_turns(job: tuple[Path, str, str], n_rounds: int, alone: bool) -> None:
    """Both ways, round after round; prints a table."""
    ways = {"scbert finetune": ours} | ({} if alone else {"scikit-learn, 7 x 5 fits": scikit_learn})
    found = {name: [] for name in ways}
    for _ in range(n_rounds):
        for name, way in ways.items():
            found[name].append(way(*job))
            print(f"{name}: {found[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    print("| way | seconds (median) | macro-F1 of 5 folds |\n|---|---:|---:|")
    for name, rounds in found.items():
        seconds = np.median([one["seconds"] for one in rounds])
        print(f"| {name} | {seconds:.1f} | {rounds[0]['macro_f1']:.3f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Peak memory of this process: {peak:.1f} GiB.")


if __name__ == "__main__":
    sys.exit(main())
