"""Time and peak memory of `scbert annotate` from ten thousand to a million cells, with a tiny model.

    python benchmarks/annotate_scale.py

writes benchmarks/results/annotate_scale.json and the plot of docs/scaling.md; it takes two minutes and 2 GB of disk.

The cells are synthetic (drawn counts, appended to an .h5ad chunk by chunk) and the model has random weights: what is
measured is everything around the model. Every annotation runs in a process of its own, so that its peak is its own.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch

from scbert.modeling_scbert import ScBertConfig, ScBertForCellClassification
from scbert.tokenization import ScBertTokenizer
from tokenizer_speed import draw_counts

CHUNK = 20_000
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "annotate_scale.json"
PLOT = ROOT / "docs" / "images" / "annotate_scale.png"
LABELS = [f"type {i}" for i in range(10)]


def write_atlas(path, n_cells, panel, n_expressed):
    """An .h5ad of `n_cells` synthetic cells, never more than a chunk of them in memory."""
    chunk = draw_counts(min(CHUNK, n_cells), len(panel), n_expressed)
    head = anndata.AnnData(chunk[:1], var=pd.DataFrame(index=panel))
    head.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        matrix = file["X"]
        for name, kind in (("data", np.float32), ("indices", np.int32)):
            del matrix[name]
            matrix.create_dataset(name, shape=(0,), maxshape=(None,), dtype=kind, chunks=(1 << 20,))
        lengths = []
        for start in range(0, n_cells, CHUNK):
            part = chunk[: n_cells - start]
            for name in ("data", "indices"):
                dataset, values = matrix[name], getattr(part, name)[: part.nnz]
                place = len(dataset)
                dataset.resize(place + len(values), axis=0)
                dataset[place:] = values
            lengths.append(np.diff(part.indptr))
        del matrix["indptr"]
        matrix["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
        matrix.attrs["shape"] = (n_cells, len(panel))
        obs = pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)])
        obs["donor"] = pd.Categorical(np.array(["d1", "d2", "d3", "d4"])[np.arange(n_cells) % 4])
        anndata.io.write_elem(file, "obs", obs)


def write_model(folder, panel):
    """A classifier of one small layer that reads expressed genes only."""
    torch.manual_seed(0)
    tokenizer = ScBertTokenizer(gene_panel=panel, keep_zeros=False)
    config = ScBertConfig(
        max_position_embeddings=len(panel) + 1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        head_dim=8, intermediate_size=8, num_random_features=8, classifier_hidden_sizes=(), pooling="mean",
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    ScBertForCellClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder, n_cells, panel, n_expressed, processes):
    """Seconds and peak memory (GiB, of the largest process) of annotating `n_cells` cells."""
    query, output = folder / "query.h5ad", folder / "annotated.h5ad"
    write_atlas(query, n_cells, panel, n_expressed)
    command = [sys.executable, "-m", "scbert", "annotate", str(query), "--model", str(folder / "model")]
    command += ["--output", str(output), "--json"]
    command += ["--processes", str(processes)] if processes else []
    # the child's own account: wait4 knows the peak of it and of the processes it waited for
    script = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "cells": n_cells,
        "processes": processes or 1,
        "seconds": round(seconds, 1),
        "cells_per_second": round(n_cells / seconds),
        "peak_gib": round(int(re.search(r"peak (\d+)", done.stderr)[1]) * unit / 2**30, 3),
        "file_gib": round(query.stat().st_size / 2**30, 3),
    }
    assert json.loads(done.stdout)["cells"] == n_cells
    for path in (query, output):
        path.unlink()
    return result


def draw_plot(results, path):
    """Peak memory and time against the number of cells, with the size of the file for comparison."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    cells = [row["cells"] for row in results]
    left.plot(cells, [row["peak_gib"] for row in results], "o-", label="peak memory of a process")
    left.plot(cells, [row["file_gib"] for row in results], "s--", color="0.6", label="size of the file")
    left.set_ylabel("GiB")
    left.legend(frameon=False)
    right.plot(cells, [row["seconds"] for row in results], "o-")
    right.set_ylabel("seconds")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("cells")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    figure.suptitle("scbert annotate, synthetic cells, tiny model", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--expressed", type=int, default=100, help="non-zero genes a cell")
    parser.add_argument("--processes", type=int, help="as of scbert annotate")
    parser.add_argument("--folder", type=Path, help="where the cells are put meanwhile")
    parser.add_argument("--output", type=Path, default=RESULTS, help="figures to write, as JSON")
    parser.add_argument("--plot", type=Path, default=PLOT, help="picture to write")
    args = parser.parse_args()
    panel = [f"GENE{i}" for i in range(args.genes)]
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        write_model(folder / "model", panel)
        for n_cells in args.cells:
            results.append(measure(folder, n_cells, panel, args.expressed, args.processes))
            print(json.dumps(results[-1]), flush=True)
    about = {"genes": args.genes, "expressed": args.expressed, "labels": len(LABELS), "runs": results}
    args.output.write_text(json.dumps(about, indent=1) + "\n")
    draw_plot(results, args.plot)


if __name__ == "__main__":
    main()
