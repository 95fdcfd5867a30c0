"""Annotating many cells with several processes, shard by shard: what is finished stays.

The shards are files in ``OUTPUT.partial`` until the output is written. Processes are started here
(``scbert annotate --processes N``) or by a launcher (``accelerate launch -m scbert.inference.annotate_cells``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from accelerate import PartialState

from ..data.disk_matrix import DiskMatrix
from ..data.paths import atomic_file, keep_record, partial_of, stamp_of, take_partial_folder
from ..data.read import matrix_rows
from ..data.worker_processes import end_with_parent
from ..tokenization import InputError, align_genes
from ..tokenization.expression_scbert import INPUT_KINDS, as_csr
from ..trained_model.model_folder import find_model, load_model
from ..trained_model.prediction import LoadedModel, predict_probabilities
from .query import CHUNK_SIZE, BinnedQuery, name_genes, opened, progress_bar

logger = logging.getLogger(__name__)

SHARD_CELLS = 2 * CHUNK_SIZE
RECORD = "run.json"


def launched() -> tuple[int, int]:
    """Number of this process and of all, where a launcher (accelerate, torchrun) started several; else 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class ShardedPrediction:
    """
    Probabilities of all cells from shards that several processes write; stands in for one process's loop.

    The arguments are those of `annotate_file`; a launcher's processes are used as they are.
    """

    def __init__(self, query, model, output, overwrite, processes, resume, gene_table, **options):
        if isinstance(model, LoadedModel):
            raise InputError("Several processes load the model themselves: give its folder.")
        self.processes, self.resume, self.overwrite = 1 if processes is None else processes, resume, overwrite
        if self.processes < 1:
            raise InputError(f"The number of processes must be 1 or more; found {processes}.")
        model = find_model(model)
        # what every process has to know; a restarted run must have the same
        self.facts = {
            "query": str(query),
            "model": str(model),
            "content of the query": stamp_of(Path(query)),
            "content of the model": stamp_of(Path(model)),
            "shard_cells": SHARD_CELLS,
            "gene_table": None if gene_table is None else str(gene_table),
            **options,
        }
        self.output, self.folder = output, partial_of(output)

    def predict(
        self, query: BinnedQuery, loaded: LoadedModel, progress: bool, held: contextlib.ExitStack
    ) -> np.ndarray | DiskMatrix:
        """Probabilities [cells, labels]; until `held` is closed no other run takes the folder."""
        shards, shard_cells = self._shards(query.n_cells), self.facts["shard_cells"]
        rank, world_size = launched()
        if rank == 0:
            held.enter_context(take_partial_folder(self.output, self.overwrite, self.resume))
            keep_record(self.folder / RECORD, self.facts)
        if world_size > 1:
            # no shard is written before the folder is this run's
            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
            self.write_shards(rank, world_size, loaded)
            if rank:
                raise SystemExit(0)
        else:
            self._work(shards, query.n_cells, progress)
        while not all(path.exists() for path in shards):
            # the launcher ends this process where another fails
            time.sleep(0.2)
        probabilities = query.new_rows(len(loaded.labels), self.output)
        for number, path in enumerate(shards):
            cells = slice(number * shard_cells, (number + 1) * shard_cells)
            with np.load(path) as stored:
                probabilities[cells] = stored["probabilities"]
        return probabilities

    def _work(self, shards, n_cells, progress):
        """Start the processes and wait for them; one that fails ends all."""
        context = multiprocessing.get_context("spawn")
        problems, shard_cells = context.SimpleQueue(), self.facts["shard_cells"]
        workers = [
            context.Process(target=_worker, args=(self, i, problems), daemon=True)
            for i in range(min(self.processes, len(shards)))
        ]
        try:
            for worker in workers:
                worker.start()
            with progress_bar(n_cells, "Annotating", progress) as bar:
                while any(worker.is_alive() for worker in workers):
                    time.sleep(0.1)
                    bar.update(min(n_cells, shard_cells * sum(path.exists() for path in shards)) - bar.n)
                    _check(workers, problems, self.folder)
            _check(workers, problems, self.folder)
        finally:
            for worker in workers:
                worker.terminate()

    def _shards(self, n_cells):
        """Files of all shards, in order."""
        starts = range(0, n_cells, self.facts["shard_cells"])
        return [self.folder / f"cells-{start:012d}.npz" for start in starts]

    def write_shards(self, rank: int, world_size: int, loaded: LoadedModel | None = None) -> None:
        """Predict every `world_size`-th shard from number `rank` on; those there already are left as they are."""
        facts = self.facts
        if loaded is None:
            loaded = load_model(facts["model"], "annotation", _device(facts["device"], rank), facts["dtype"])
        with opened(facts["query"], facts["layer"]) as adata:
            panel = loaded.tokenizer.gene_panel
            matrix, names = matrix_rows(adata, facts["layer"], panel)
            alignment = align_genes(name_genes(names, panel, facts["gene_table"]), panel)
            kind, scale = loaded.tokenizer.resolve_input(matrix, facts["input"])
            for path in self._shards(matrix.shape[0])[rank::world_size]:
                if path.exists():
                    continue
                start = int(path.stem.rpartition("-")[2])
                stop = min(start + facts["shard_cells"], matrix.shape[0])
                rows = as_csr(matrix[start:stop])
                bins = sp.csr_matrix(loaded.tokenizer.bin_rows(rows, alignment, kind, scale is not None))
                probabilities = predict_probabilities(loaded, bins, alignment.absent, facts["batch_size"])
                with atomic_file(path) as handle:
                    np.savez(handle, probabilities=probabilities)

    def finish(self) -> None:
        """Take the shards away once the output stands."""
        if launched()[0] == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _check(workers, problems, folder):
    for worker in workers:
        if worker.exitcode:
            if not problems.empty():
                raise InputError(problems.get())
            raise InputError(
                f"A process of this run ended with code {worker.exitcode}"
                f"{' (killed; perhaps for want of memory)' if worker.exitcode == -9 else ''}. What is finished is "
                f"in {folder}: the same command with --resume goes on from there."
            )


def _worker(prediction, rank, problems):
    end_with_parent()
    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // prediction.processes))
        prediction.write_shards(rank, prediction.processes)
    except (InputError, OSError) as problem:
        problems.put(str(problem))
        sys.exit(1)


def _device(device, rank):
    """The GPUs of a machine in turn, unless a device was named."""
    if device is None and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    return device


def main(annotate_file: Any, arguments: list[str] | None = None) -> int:
    """Entry of ``accelerate launch -m scbert.inference.annotate_cells``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scbert.inference.annotate_cells", description="See scbert annotate --help."
    )
    parser.add_argument("query")
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", help="the annotator that ships without it")
    for name, kind in (("threshold", float), ("coverage", float), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("tissue", "majority-vote", "report", "layer", "gene-table", "dtype", "device"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--values", "--input", dest="input", default="auto", choices=INPUT_KINDS)
    for name in ("force", "overwrite", "resume"):
        parser.add_argument(f"--{name}", action="store_true")
    options = vars(parser.parse_args(arguments))
    rank, world_size = launched()
    options["device"] = options["device"] or _device(None, rank)
    try:
        summary = annotate_file(**options, processes=world_size)
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(
        json.dumps({name: value for name, value in summary.items() if isinstance(value, str | int | float)})
    )
    return 0
