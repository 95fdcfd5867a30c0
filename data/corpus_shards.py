"""One file of cells to shards of a corpus: scanned once, then written.

Both steps leave a record beside the corpus that is being built, so that an interrupted build continues there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from ..tokenization import InputError, align_genes
from ..tokenization.cells_scbert import feature_modalities, sample_rows
from ..tokenization.expression_scbert import (
    as_csr,
    check_values,
    detect_input_kind,
    is_integer_valued,
    log1p_scale,
)
from .corpus_manifest import checksum
from .paths import atomic_file
from .quality_control import choose_cells, measure_cells
from .read import CHUNK_SIZE, matrix_rows, opened_cells
from .regions import genome_build

LISTS = {"gene_ids": pa.list_(pa.int32()), "values": pa.list_(pa.float32())}
NAMES = {"cell": pa.string(), "file": pa.string()}
ARROW_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "string": pa.string()}


@dataclass
class Scan:
    """What the scan of a file found."""

    # genes (names to be taken), modalities, genome_build, obs (column -> kind), kind (counts or log1p),
    # covers_all_genes (or log1p of a part of them), cells, and rules: the report of `choose_cells`
    facts: dict
    # bool [cells]
    keep: np.ndarray
    # uint64 [cells], equal where genes and values of two cells are
    hashes: np.ndarray


def scan_file(source, input, rules, record):
    """The `Scan` of a `Source`, in bounded memory; kept in `record`, an .npz file, and read from there next time."""
    if record.exists():
        with np.load(record) as stored:
            return Scan(json.loads(str(stored["facts"])), stored["keep"], stored["hashes"])
    with opened_cells(source.path, layer=source.layer) as adata, _damage(source.path):
        scan = _scan(adata, source, input, rules)
    with atomic_file(record) as handle:
        np.savez(handle, facts=json.dumps(scan.facts), keep=scan.keep, hashes=scan.hashes)
    return scan


def _scan(adata, source, input, rules):
    matrix, names = matrix_rows(adata, source.layer)
    sample = sample_rows(matrix)
    kind = detect_input_kind(sample) if input == "auto" else input
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    gene_hashes = np.frombuffer(b"".join(digests), dtype="<u8")
    hashes = []

    def look(chunk):
        check_values(chunk)
        if input == "auto" and kind == "counts" and not is_integer_valued(chunk):
            raise InputError(
                "Some cells have fractions, others whole-number counts. Say what the values are: input='counts' or "
                "'log1p' (--values counts, --values log1p)."
            )
        hashes.append(hash_cells(chunk, gene_hashes))

    quality = measure_cells(adata, source.layer, on_chunk=look, log1p=kind == "log1p")
    keep, report = choose_cells(adata.obs, quality, rules)
    taken = quality.cells_per_gene >= max(1, rules.min_cells)
    modalities = feature_modalities(adata.var) if len(names) == adata.n_vars else None
    modalities = np.zeros(len(names), dtype=int) if modalities is None else modalities
    facts = {
        "genes": [name for name, is_taken in zip(names, taken) if is_taken],
        "modalities": modalities[taken].tolist(),
        "genome_build": genome_build(adata.uns.get("genome_build")),
        "obs": {str(name): _kind_of(adata.obs[name]) for name in adata.obs.columns},
        "kind": kind,
        "covers_all_genes": kind == "counts" or log1p_scale(sample) is not None,
        "cells": int(adata.n_obs),
        "rules": report,
    }
    return Scan(facts, keep, np.concatenate(hashes))


def hash_cells(chunk, gene_hashes):
    """A 64-bit hash of the genes and values of every cell (CSR [cells, genes]), in whatever order they come.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> cells = sp.csr_matrix(np.array([[1, 2], [2, 1], [1, 2]], dtype=np.float32))
    >>> a, b, c = hash_cells(cells, np.array([5, 6], dtype=np.uint64))
    >>> bool(a == c), bool(a == b)
    (True, False)
    """
    values = chunk.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    values *= np.uint64(0x9E3779B97F4A7C15)
    # pandas has the finalizer of splitmix64: neighbouring inputs come out unrelated, so that sums seldom collide
    values = pd.util.hash_array(values ^ gene_hashes[chunk.indices])
    sums = np.zeros(chunk.shape[0], dtype=np.uint64)
    rows = np.flatnonzero(np.diff(chunk.indptr))
    if len(rows):
        sums[rows] = np.add.reduceat(values, chunk.indptr[rows])
    return sums


def _kind_of(column):
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.cat.categories
    if pd.api.types.is_bool_dtype(column.dtype):
        return "bool"
    return {"i": "int", "u": "int", "f": "float"}.get(getattr(column.dtype, "kind", "O"), "string")


def corpus_schema(scans, sources, columns=None):
    """The pyarrow schema of a corpus: expression, names, and what the obs tables and the manifest hold.

    Of `obs` the `columns` are kept; all of them if left out.
    """
    kinds = {"dataset": {"string"}}
    for scan in scans:
        for name, kind in scan.facts["obs"].items():
            if columns is None or name in columns:
                kinds.setdefault(name, set()).add(kind)
    for source in sources:
        kinds.update({name: {"string"} for name in source.columns})
    clash = sorted(set(kinds) & {*LISTS, *NAMES})
    if clash:
        raise InputError(f"A corpus has columns of its own called {', '.join(clash)}; rename those in obs.")
    for name, found in kinds.items():
        only = "float" if found == {"int", "float"} else "string"
        kinds[name] = ARROW_TYPES[min(found) if len(found) == 1 else only]
    return pa.schema({**LISTS, **NAMES, **kinds})


def write_file(source, rows, facts, genes, schema, folder, number, shard_cells):
    """Write the cells `rows` (ascending) of the file `number` as shards ``cells-NUMBER-00000.arrow`` and so on.

    Shards that are there stay. `facts` are of the file's `Scan`, `genes` those of the corpus in order. Returns a dict
    with ``file``, ``cells``, ``values``, ``bytes`` and ``sha256`` for every shard.
    """
    shards = [rows[start : start + shard_cells] for start in range(0, len(rows), shard_cells)]
    paths = [folder / f"cells-{number:05d}-{place:05d}.arrow" for place in range(len(shards))]
    missing = [(path, shard) for path, shard in zip(paths, shards) if not path.with_suffix(".json").exists()]
    if missing:
        with opened_cells(source.path, layer=source.layer) as adata:
            batches = _Batches(adata, source, facts, genes, schema)
            for path, shard in missing:
                found = _write_shard(path, batches.of(shard), schema)
                with atomic_file(path.with_suffix(".json")) as handle:
                    handle.write(json.dumps({"file": path.name, "cells": len(shard), **found}).encode())
    return [json.loads(path.with_suffix(".json").read_text()) for path in paths]


def _write_shard(path, batches, schema):
    n_values = 0
    with atomic_file(path) as handle, pa.ipc.new_stream(handle, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            n_values += len(batch.column("values").values)
    return {"values": n_values, "bytes": path.stat().st_size, "sha256": checksum(path)}


class _Batches:
    """Cells of one open file as Arrow record batches."""

    def __init__(self, adata, source, facts, genes, schema):
        self.path = source.path
        self.matrix, names = matrix_rows(adata, source.layer)
        # a gene that too few cells of this file express stays out of it, though another file may bring it in
        own = set(facts["genes"])
        self.alignment = align_genes([name if name in own else "" for name in names], genes)
        self.kind, self.schema = facts["kind"], schema
        self.obs, self.cells = adata.obs, adata.obs_names.to_numpy().astype(str)
        self.constants = {"file": source.path.name, **source.columns}
        if "dataset" not in adata.obs:
            self.constants.setdefault("dataset", source.path.stem)

    def of(self, rows):
        """Record batches of up to CHUNK_SIZE cells."""
        for start in range(0, len(rows), CHUNK_SIZE):
            chosen = rows[start : start + CHUNK_SIZE]
            yield self._batch(chosen, self._values(chosen))

    def _values(self, rows):
        with _damage(self.path):
            # a slice is cheap on disk; a list of rows is not
            values = as_csr(self.matrix[int(rows[0]) : int(rows[-1]) + 1])
        if values.shape[0] > len(rows):
            values = values[rows - rows[0]]
        if self.kind == "counts":
            return self.alignment.apply(values)
        return self.alignment.apply_to_logs(values, dtype=None)

    def _batch(self, rows, values):
        offsets = pa.array(values.indptr.astype(np.int32))
        arrays = {
            "gene_ids": pa.ListArray.from_arrays(offsets, pa.array(values.indices.astype(np.int32))),
            "values": pa.ListArray.from_arrays(offsets, pa.array(values.data.astype(np.float32))),
            "cell": pa.array(self.cells[rows]),
        }
        for field in self.schema:
            if field.name in arrays:
                continue
            if field.name in self.constants:
                arrays[field.name] = pa.array([self.constants[field.name]] * len(rows), field.type)
            elif field.name in self.obs:
                arrays[field.name] = _column(self.obs[field.name].iloc[rows], field.type)
            else:
                arrays[field.name] = pa.nulls(len(rows), field.type)
        return pa.record_batch([arrays[name] for name in self.schema.names], schema=self.schema)


def _column(values, kind):
    values = values.astype(object)
    missing = values.isna().to_numpy()
    if kind == pa.string():
        values = values.astype(str)
    return pa.array(values.to_numpy(), kind, mask=missing)


@contextlib.contextmanager
def _damage(path):
    """Blame the file for a block that cannot be read, but not for a full disk and the like."""
    try:
        yield
    except OSError as error:
        # h5py reports damage without an error number
        if error.errno is not None:
            raise
        raise InputError(
            f"{path} cannot be read to its end: it is corrupt or truncated ({error})."
        ) from error
