"""Time and peak memory of tokenising and pretraining cells of a real file.

    python benchmarks/pretraining_cost.py CELLS.h5ad --genes PANEL --cells 1000 --recipe small
    python benchmarks/pretraining_cost.py CELLS.h5ad --genes PANEL --recipe scbert --steps 4

With `--steps` the seconds of an epoch are those of the steps, scaled to all cells; `--batch-size` cells a step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from scbert.data.read import read_cells, read_gene_names
from scbert.tokenization import ScBertTokenizer
from scbert.training.run_pretrain import pretrain
from tokenizer_speed import peak_gib


def measure_tokenizing(path, panel):
    """Seconds of reading, of binning and of encoding all cells of a file in batches of 64."""
    start = time.perf_counter()
    adata = read_cells(path)
    reading = time.perf_counter() - start
    tokenizer = ScBertTokenizer(gene_panel=panel)
    start = time.perf_counter()
    bins = tokenizer.bin_cells(adata)
    binning = time.perf_counter() - start
    start = time.perf_counter()
    for first in range(0, bins.shape[0], 64):
        tokenizer.encode_bins(bins[first : first + 64])
    return {
        "reading_seconds": round(reading, 2),
        "binning_seconds": round(binning, 2),
        "encoding_seconds": round(time.perf_counter() - start, 2),
        "expressed_genes": float(np.diff(bins.indptr).mean().round(1)),
        "tokenizing_peak_gib": round(peak_gib(), 2),
    }


def measure_pretraining(path, folder, options):
    """Seconds an epoch and scores of a pretraining run."""
    start = time.process_time()
    summary = pretrain(path, folder / "model", disable_tqdm=True, eval_strategy="no", **options)
    settings, training = summary["settings"], summary["training"]
    run = next(row for row in training["history"] if "train_runtime" in row)
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    seen = min(training["steps"] * batch, round(training["epochs"] * summary["cells"]["train"]))
    scores = (
        "loss",
        "baseline_loss",
        "masked_accuracy",
        "baseline_masked_accuracy",
        "cell_baseline_masked_accuracy",
        "masked_accuracy_bin_mean",
    )
    return {
        "parameters": training["parameters"],
        "cells": summary["cells"],
        "cells_seen": seen,
        # of all threads, scoring included: what a busy machine does not stretch
        "cpu_seconds": round(time.process_time() - start, 1),
        "seconds_a_cell": round(run["train_runtime"] / seen, 4),
        "seconds_1000_cells": round(1000 * run["train_runtime"] / seen, 1),
        "pretraining_peak_gib": round(peak_gib(), 2),
        **{name: round(summary[name], 4) for name in scores},
    }


def main():
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--genes", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--gene-vectors", type=Path)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    args = parser.parse_args()
    options = {
        "genes": args.genes,
        "recipe": args.recipe,
        "max_steps": args.steps,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "gene_vectors": args.gene_vectors,
        "gradient_checkpointing": args.checkpointing or None,
        "gradient_accumulation_steps": 1 if args.steps else None,
        # a few cells, so that scoring does not outlast training
        "validation_fraction": 0.01 if args.steps else 0.1,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adata = read_cells(args.file)
        chosen = np.random.default_rng(0).permutation(adata.n_obs)[: args.cells]
        adata[np.sort(chosen)].copy().write_h5ad(folder / "cells.h5ad")
        result = {"file": args.file.name, "recipe": args.recipe, "cells": len(chosen)}
        result |= measure_tokenizing(folder / "cells.h5ad", read_gene_names(args.genes))
        result["pretraining"] = measure_pretraining(folder / "cells.h5ad", folder, options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
