"""Cells of a corpus, or of files as they are, for training: read and binned on demand, in bounded memory.

`BinnedCells` is map-style and can be read in any order. `StreamOrder` is an order that reads neighbouring cells
together and shares them among processes and workers, which suits disks and caches.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from torch.utils.data import Sampler

from ..tokenization import InputError, align_genes
from ..tokenization.expression_scbert import as_csr
from .corpus_manifest import read_manifest, shards_of, shards_of_source
from .read import matrix_rows, read_cells

# cells of a file read together, and how many such blocks stay in memory
BLOCK_SIZE = 1024
KEPT_BLOCKS = 32


class Shard:
    """A shard of a corpus, mapped into memory: its lists are the arrays of CSR matrices as they stand.

    `facts` are those of `shards_of`; `alignment` leads from the genes of the corpus to the panel.
    """

    def __init__(self, folder, facts, alignment):
        self.path, self.alignment = Path(folder) / facts["file"], alignment
        self.n_cells, self.kind = facts["cells"], facts["kind"]
        self.covers_all_genes = facts["covers_all_genes"]
        self._bytes = facts["bytes"]

    def check(self):
        """Refuse a shard that is missing or truncated, by its size alone."""
        size = self.path.stat().st_size if self.path.is_file() else None
        if size != self._bytes:
            found = (
                "is missing" if size is None else f"has {size} bytes, not the {self._bytes} it was built with"
            )
            raise self._unreadable(found)

    def _unreadable(self, found):
        return InputError(
            f"The shard {self.path} {found}. Restore an intact copy (scbert build-corpus {self.path.parent} --verify "
            f"names all files that differ), or build the corpus again."
        )

    @cached_property
    def _batches(self):
        """Where each record batch starts, and its cells as CSR."""
        self.check()
        try:
            with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
                batches = [self._csr(batch) for batch in stream]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise self._unreadable(f"cannot be read ({error})") from error
        starts = np.cumsum([0, *(batch.shape[0] for batch in batches)])
        if starts[-1] != self.n_cells:
            raise self._unreadable(f"holds {starts[-1]} cells, not {self.n_cells}")
        return starts, batches

    def _csr(self, batch):
        genes, values = batch.column("gene_ids"), batch.column("values")
        # no copy: pages come in from the disk when rows are taken
        arrays = (
            array.to_numpy(zero_copy_only=True) for array in (values.values, genes.values, genes.offsets)
        )
        return sp.csr_matrix(tuple(arrays), shape=(len(batch), len(self.alignment.target)), copy=False)

    def rows(self, rows):
        """The cells at `rows` (ascending) as CSR [rows, genes of the corpus]."""
        starts, batches = self._batches
        return _rows_of_parts(batches, starts, rows, lambda batch, own: batch[own])

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_batches"}


class CellFile:
    """A file of cells as it is, read in blocks of neighbouring cells; the last few stay in memory."""

    def __init__(self, path, tokenizer, layer=None, input="auto"):
        self.path, self._layer = Path(path), layer
        matrix, names = self._open(tokenizer.gene_panel)
        self.n_cells = matrix.shape[0]
        self.alignment = align_genes(names, tokenizer.gene_panel)
        self.kind, scale = tokenizer.resolve_input(matrix, input)
        self.covers_all_genes = scale is not None

    def _open(self, panel=None):
        cells = read_cells(self.path, layer=self._layer, backed=True)
        matrix, names = matrix_rows(cells, self._layer, panel)

        @lru_cache(KEPT_BLOCKS)
        def block(number):
            return as_csr(matrix[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])

        # an open HDF5 file must not be shared with a forked worker
        self._block, self._process = block, os.getpid()
        return matrix, names

    def rows(self, rows):
        """The cells at `rows` (ascending) as CSR [rows, genes of the file]."""
        if self._process != os.getpid():
            self._open()
        numbers = rows // BLOCK_SIZE
        parts = [
            self._block(number)[rows[numbers == number] - number * BLOCK_SIZE]
            for number in np.unique(numbers)
        ]
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def __getstate__(self):
        return {**self.__dict__, "_block": None, "_process": None}


def _rows_of_parts(parts, starts, rows, take):
    """CSR of the `rows` (ascending, counted through all parts) of what begins at `starts`: ``take(part, own rows)``."""
    owned = np.split(rows, np.searchsorted(rows, starts[1:-1]))
    taken = [take(part, own - start) for part, start, own in zip(parts, starts, owned) if len(own)]
    return taken[0] if len(taken) == 1 else sp.vstack(taken, format="csr")


def open_corpus(folder, tokenizer):
    """The shards of a corpus, checked to be there, with their genes aligned to the tokenizer's panel."""
    manifest = read_manifest(folder)
    alignment = align_genes(manifest["genes"], tokenizer.gene_panel)
    shards = [Shard(folder, facts, alignment) for facts in shards_of(manifest)]
    for shard in shards:
        shard.check()
    return shards


@dataclass(frozen=True)
class CorpusPart:
    """The part of a corpus that came from one file, for measures taken file by file; see `corpus_parts`."""

    folder: Path
    shards: list
    genes: list

    @property
    def name(self):
        """Name of the file the cells came from."""
        return Path(self.shards[0]["source"]).name

    def sample(self, max_cells=None, seed=0):
        """Cells drawn at random, in ascending order: CSR [cells, genes], the genes' names, "counts" or "log1p".

        The genes are those expressed here; of genes that only other files have, nothing is known.
        """
        alignment = align_genes(self.genes, self.genes)
        shards = [Shard(self.folder, shard, alignment) for shard in self.shards]
        starts = np.cumsum([0, *(shard.n_cells for shard in shards)])
        rows = np.sort(np.random.default_rng(seed).permutation(starts[-1])[:max_cells])
        values = _rows_of_parts(shards, starts, rows, Shard.rows)
        own = np.flatnonzero(np.bincount(values.indices, minlength=len(self.genes)))
        return values[:, own], [self.genes[i] for i in own], self.shards[0]["kind"]


def corpus_parts(folder):
    """The files of a corpus from which cells were taken, as `CorpusPart`."""
    manifest = read_manifest(folder)
    parts = [shards_of_source(source) for source in manifest["sources"]]
    return [CorpusPart(Path(folder), shards, manifest["genes"]) for shards in parts if shards]


class BinnedCells:
    """Expression bins of the cells of shards or files, read and binned when they are asked for.

    They are indexed as the rows of a CSR matrix are: ``cells[rows]`` is CSR [rows, panel], in any order of rows. Their
    `parts` are `Shard` or `CellFile` objects.
    """

    def __init__(self, parts, tokenizer):
        self.parts, self.tokenizer = list(parts), tokenizer
        self.starts = np.cumsum([0, *(part.n_cells for part in self.parts)])
        self.shape = int(self.starts[-1]), len(tokenizer.gene_panel)

    def __getitem__(self, rows):
        rows = np.asarray(rows, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        chosen = rows[order]

        def bin_part(part, own):
            return self.tokenizer.bin_rows(part.rows(own), part.alignment, part.kind, part.covers_all_genes)

        stacked = _rows_of_parts(self.parts, self.starts, chosen, bin_part)
        return stacked if (order[:-1] < order[1:]).all() else stacked[np.argsort(order)]


class StreamOrder(Sampler):
    """Batches of one process: every cell once an epoch over all processes and workers, neighbours together.

    Blocks of neighbouring cells are shuffled, and each worker of each process gets one contiguous share of them;
    cells are shuffled within windows of several blocks. Batch ``i`` goes to worker ``i % n_workers``, as torch's
    DataLoader has it, and so each worker reads its own share. All processes have equally many batches: the last
    one of a worker may be one cell longer. The order depends on seed, epoch and number of processes and workers.

    This process is number `rank` of `world_size`; `n_workers` are those of the DataLoader, where 0 counts as 1. There
    are `block_size` cells in a block and `window` blocks in a window. A `numbered` order goes on counting from epoch to
    epoch, as `training.cell_batches` wants it.

    Examples
    --------
    >>> order = StreamOrder(10, batch_size=4, block_size=2)
    >>> sorted(cell for batch in order for cell in batch) == list(range(10)), len(order)
    (True, 3)
    """

    def __init__(
        self, n_cells, batch_size, seed=0, rank=0, world_size=1, n_workers=0,
        block_size=BLOCK_SIZE, window=16, numbered=False,
    ):  # fmt: skip
        self.n_cells, self.batch_size, self.seed = n_cells, batch_size, seed
        self.n_workers = max(1, n_workers)
        self.n_shares, self.first_share = world_size * self.n_workers, rank * self.n_workers
        self.block_size, self.window, self.numbered = block_size, window, numbered
        self.epoch = 0
        if n_cells < self.n_shares:
            raise InputError(f"{n_cells} cell(s) cannot be shared among {self.n_shares} workers; use fewer.")

    def set_epoch(self, epoch):
        """Choose the epoch of the next pass."""
        self.epoch = int(epoch)

    @property
    def batches_per_worker(self):
        """Batches that each worker of each process makes in an epoch."""
        return -(-(self.n_cells // self.n_shares) // self.batch_size)

    def __len__(self):
        return self.batches_per_worker * self.n_workers

    def __iter__(self):
        first = self.epoch * self.n_cells if self.numbered else 0
        shares = [self._batches(self.first_share + worker) for worker in range(self.n_workers)]
        for _ in range(self.batches_per_worker):
            for share in shares:
                yield (next(share) + first).tolist()

    def _batches(self, share):
        """Batches of one share; the last one takes what is left."""
        waiting, size = np.empty(0, dtype=np.int64), self.batch_size
        remaining = self.batches_per_worker
        for cells in self._windows(share):
            waiting = np.concatenate([waiting, cells])
            while remaining > 1 and len(waiting) >= size:
                yield waiting[:size]
                waiting, remaining = waiting[size:], remaining - 1
        yield waiting

    def _windows(self, share):
        """Cells of one share, some blocks at a time, shuffled among themselves."""
        n_blocks = -(-self.n_cells // self.block_size)
        blocks = np.random.default_rng([self.seed, self.epoch]).permutation(n_blocks)
        # all blocks are full but the last of the file, wherever it fell
        sizes = np.minimum(self.block_size, self.n_cells - blocks * self.block_size)
        ends = np.cumsum(sizes)
        # what leads from a place among the shuffled blocks to the cell there
        shifts = blocks * self.block_size - (ends - sizes)
        start, stop = (self.n_cells * i // self.n_shares for i in (share, share + 1))
        rng = np.random.default_rng([self.seed, self.epoch, share])
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        for block in range(first, last + 1, self.window):
            until = min(stop, int(ends[min(block + self.window - 1, last)]))
            places = np.arange(start, until)
            yield rng.permutation(places + shifts[np.searchsorted(ends, places, side="right")])
            start = until
