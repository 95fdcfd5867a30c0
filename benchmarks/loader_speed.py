"""Full-length cells a second that the loader makes of a corpus, beside files as they are.

    python benchmarks/loader_speed.py --json

Counts are drawn (some 1,250 non-zero genes a cell, columns in another order than the panel's), built into a corpus
and read as in pretraining: binned, masked, made dense to 16,907 tokens. The pages are in the system's cache.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
from torch.utils.data import DataLoader

from scbert.data.corpus_build import build_corpus
from scbert.data.corpus_stream import BinnedCells, CellFile, StreamOrder, open_corpus
from scbert.tokenization import ScBertTokenizer
from scbert.training.cell_batches import CellDataset, DataCollatorForMaskedExpression
from scbert.training.cell_order import EpochSampler
from tokenizer_speed import draw_counts, peak_gib


def write_cells(path, n_cells, n_genes, n_expressed, seed=0):
    """An .h5ad of drawn counts; returns the panel its columns belong to."""
    panel = [f"GENE{i}" for i in range(n_genes)]
    adata = anndata.AnnData(draw_counts(n_cells, n_genes, n_expressed, seed))
    adata.var_names = list(np.random.default_rng(1).permutation(panel))
    adata.obs_names = [f"cell_{i}" for i in range(n_cells)]
    adata.write_h5ad(path)
    return panel


def cells_per_second(cells, tokenizer, streamed, n_workers, batch_size, n_cells):
    """
    Read `n_cells` cells in batches and divide by the time, and by this process's processor time.

    The start of the workers is not counted. Without workers the second figure is that of one core, whatever else the
    machine has to do.
    """
    if streamed:
        order = StreamOrder(len(cells), batch_size, n_workers=n_workers, numbered=True)
        options = {"batch_sampler": order}
    else:
        options = {"sampler": EpochSampler(len(cells)), "batch_size": batch_size}
    collator = DataCollatorForMaskedExpression(tokenizer)
    loader = DataLoader(CellDataset(cells), num_workers=n_workers, collate_fn=collator, **options)
    batches = iter(loader)
    for _ in range(2 * max(1, n_workers)):
        next(batches)
    start, processor, seen = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        assert batch["input_ids"].shape[1] == len(tokenizer.gene_panel) + 1
        seen += len(batch["input_ids"])
        if seen >= n_cells:
            break
    return seen / (time.perf_counter() - start), seen / (time.process_time() - processor)


def measure(n_cells, n_genes, n_expressed, batch_size, workers):
    """Rates by kind of source, order and number of workers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        panel = write_cells(folder / "cells.h5ad", n_cells, n_genes, n_expressed)
        tokenizer = ScBertTokenizer(gene_panel=panel)
        start = time.perf_counter()
        summary = build_corpus([folder / "cells.h5ad"], folder / "corpus")
        building = time.perf_counter() - start
        corpus = BinnedCells(open_corpus(folder / "corpus", tokenizer), tokenizer)
        file = BinnedCells([CellFile(folder / "cells.h5ad", tokenizer)], tokenizer)
        rates, core_rates = {}, {}
        for n_workers in workers:
            for name, cells, streamed in (
                ("corpus, any order", corpus, False),
                ("corpus, streamed", corpus, True),
                ("h5ad, streamed", file, True),
            ):
                rate, core_rate = cells_per_second(
                    cells, tokenizer, streamed, n_workers, batch_size, n_cells // 2
                )
                rates[f"{name}, {n_workers} worker(s)"] = round(rate)
                if not n_workers:
                    core_rates[name] = round(core_rate)
    return {
        "cells": n_cells,
        "tokens": n_genes + 1,
        "expressed": n_expressed,
        "batch_size": batch_size,
        "building_cells_per_second": round(n_cells / building),
        "bytes_per_cell": round(8 * summary["values"] / n_cells),
        "cells_per_second": rates,
        "cells_per_core_second": core_rates,
        "peak_gib": round(peak_gib(), 2),
    }


def main():
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=16_906)
    parser.add_argument("--expressed", type=int, default=1_250, help="non-zero genes a cell")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args()
    result = measure(args.cells, args.genes, args.expressed, args.batch_size, args.workers)
    if args.json:
        print(json.dumps(result))
        return
    cores = {f"{name}, a core": rate for name, rate in result.pop("cells_per_core_second").items()}
    for name, value in {**result.pop("cells_per_second"), **cores, **result}.items():
        print(f"{name:34} {value}")


if __name__ == "__main__":
    main()
