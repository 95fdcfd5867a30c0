"""
Annotating a file of raw counts from start to end: `scbert annotate` beside celltypist, in turn.

    python benchmarks/annotate_speed.py --output benchmarks/results/annotate_speed.json

Every run is a process of its own that reads an .h5ad and writes an annotated one, imports and normalisation included,
as a user waits for it. Two sizes of file tell the start from the cells. The cells are drawn, so speed is all that is
compared: ours is the shipped annotator, celltypist's model has as many types and `GENES` genes, as its own models have.
Where celltypist is not installed only ours is timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scbert.evaluation.baselines import BASELINES
from tokenizer_speed import draw_counts

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "model_cards" / "scbert-mini-pbmc"
# of celltypist's model
GENES = 5000
# what celltypist's guide has its users do with raw counts
CELLTYPIST = """
import sys, anndata, celltypist, scanpy
query, model, output = sys.argv[1:]
cells = anndata.read_h5ad(query)
raw = cells.X.copy()
scanpy.pp.normalize_total(cells, target_sum=1e4)
scanpy.pp.log1p(cells)
found = celltypist.annotate(cells, model=model).predicted_labels
cells.X, cells.obs["cell_type"] = raw, found["predicted_labels"]
cells.write_h5ad(output)
"""


def main() -> None:
    """Draw the cells, time both, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, nargs=2, default=[500, 5000])
    parser.add_argument("--genes", type=int, default=33_000, help="of the files")
    parser.add_argument("--expressed", type=int, default=1_500, help="non-zero genes a cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), options.cells, options.genes, options.expressed, options.rounds)
    if len(found) == 1:
        print("celltypist is not installed (pip install celltypist): only ours was timed.", file=sys.stderr)
    Console().print(table(found, options.cells))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"cells": options.cells, "genes": options.genes, "expressed": options.expressed}
        options.output.write_text(json.dumps(about | {"seconds": found}, indent=1) + "\n")


def compare(folder: Path, sizes: list[int], n_genes: int, n_expressed: int, rounds: int) -> dict:
    """Seconds of every round, by way and number of cells."""
    panel = (CARD / "gene_panel.txt").read_text().split()[:n_genes]
    names = panel + [f"OTHER{i}" for i in range(n_genes - len(panel))]
    queries = {n: folder / f"{n}.h5ad" for n in sizes}
    for n, path in queries.items():
        draw_cells(n, names, n_expressed).write_h5ad(path)
    output = folder / "annotated.h5ad"
    ways = {"scbert": lambda query: ["-m", "scbert", "annotate", query, "--output", output, "--overwrite"]}
    if find_spec("celltypist"):
        model = write_celltypist(folder / "model.pkl", names[:GENES], n_expressed)
        ways["celltypist"] = lambda query: ["-W", "ignore", "-c", CELLTYPIST, query, model, output]
    seconds = {name: {str(n): [] for n in sizes} for name in ways}
    for _ in track(range(rounds), "annotating", console=Console(stderr=True)):
        for n, query in queries.items():
            for name, command in ways.items():
                seconds[name][str(n)].append(timed(command(query)))
    return seconds


def draw_cells(n_cells: int, genes: list[str], n_expressed: int) -> anndata.AnnData:
    """Drawn counts."""
    counts = draw_counts(n_cells, len(genes), min(n_expressed, len(genes) // 2))
    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def write_celltypist(path: Path, genes: list[str], n_expressed: int) -> Path:
    """A celltypist model of as many types as the shipped annotator, learnt from drawn cells."""
    types = list(json.loads((CARD / "config.json").read_text())["label2id"])
    cells = draw_cells(20 * len(types), genes, n_expressed)
    cells.obs["cell_type"] = pd.Categorical(np.resize(types, cells.n_obs))
    BASELINES["celltypist"]().fit(cells, "cell_type").model.write(str(path))
    return path


def timed(arguments: list) -> float:
    """Seconds of a Python process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start


def table(found: dict, sizes: list[int]) -> Table:
    """Medians, and what they say of the cells beyond the start."""
    few, many = sizes
    made = Table(title="Annotating a file, whole process")
    for name in ("way", f"{few:,} cells, s", f"{many:,} cells, s", "cells/s beyond the start"):
        made.add_column(name, justify="left" if name == "way" else "right")
    for name, seconds in found.items():
        first, second = (statistics.median(seconds[str(n)]) for n in sizes)
        # on a busy machine the larger file may be the faster one
        rate = f"{(many - few) / (second - first):,.0f}" if second > first else "-"
        made.add_row(name, f"{first:.2f}", f"{second:.2f}", rate)
    return made


if __name__ == "__main__":
    main()
