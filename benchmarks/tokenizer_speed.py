"""Time and peak memory of tokenising 100,000 cells x 16,906 genes.

    python benchmarks/tokenizer_speed.py --json

Counts are drawn (geometric, some 1,250 non-zero genes a cell) and held as float32 CSR, as AnnData would;
the peak counts them, the imports and the result.
"""

import argparse
import itertools
import json
import resource
import sys
import time

import numpy as np
import scipy.sparse as sp

from scbert.tokenization import ScBertTokenizer


def draw_counts(n_cells, n_genes, n_expressed, seed=0):
    """CSR counts [n_cells, n_genes] float32 with about `n_expressed` genes a cell, row by row."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(int(n_expressed * 0.8), int(n_expressed * 1.2) + 1, size=n_cells)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    indices = np.empty(indptr[-1], dtype=np.int32)
    data = np.empty(indptr[-1], dtype=np.float32)
    for start, stop in itertools.pairwise(indptr):
        # sorted distinct genes: gaps between them, scaled to the panel
        gaps = rng.random(stop - start + 1, dtype=np.float32).cumsum()
        places = (gaps[:-1] / gaps[-1] * (n_genes - (stop - start))).astype(np.int32)
        indices[start:stop] = places + np.arange(stop - start, dtype=np.int32)
        data[start:stop] = rng.geometric(0.4, size=stop - start)
    return sp.csr_matrix((data, indices, indptr), shape=(n_cells, n_genes))


def peak_gib():
    """Peak resident memory of this process in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(n_cells, n_genes, n_expressed, mode, batch_size=64):
    """Tokenise drawn cells once; time of binning, time per encoded batch, peak memory."""
    panel = [f"GENE{i}" for i in range(n_genes)]
    # columns of files never stand in the panel's order
    names = list(np.random.default_rng(1).permutation(panel))
    options = {} if mode == "floor" else {"binning": "quantile", "n_bins": 50, "keep_zeros": False}
    tokenizer = ScBertTokenizer(gene_panel=panel, **options)
    counts = draw_counts(n_cells, n_genes, n_expressed)
    before = peak_gib()
    start = time.perf_counter()
    bins = tokenizer.bin_cells(counts, gene_names=names)
    binning = time.perf_counter() - start
    start = time.perf_counter()
    n_batches = min(20, n_cells // batch_size)
    for i in range(n_batches):
        tokenizer.encode_bins(bins[i * batch_size : (i + 1) * batch_size])
    return {
        "mode": mode,
        "cells": n_cells,
        "genes": n_genes,
        "nonzeros": int(counts.nnz),
        "binning_seconds": round(binning, 2),
        "batch_seconds": round((time.perf_counter() - start) / max(n_batches, 1), 4),
        "batch_size": batch_size,
        "peak_gib_before": round(before, 3),
        "peak_gib": round(peak_gib(), 3),
    }


def main():
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=16_906)
    parser.add_argument("--expressed", type=int, default=1_250, help="non-zero genes a cell")
    parser.add_argument("--mode", choices=["floor", "quantile"], default="floor")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args()
    result = measure(args.cells, args.genes, args.expressed, args.mode)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
