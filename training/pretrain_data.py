"""Cells of a pretraining run: of a corpus or files, in memory or streamed; checked, binned and split."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.corpus_manifest import is_corpus, read_manifest, shards_of_source
from ..data.corpus_stream import BinnedCells, CellFile, open_corpus
from ..data.multiomics import common_build
from ..data.paths import atomic_file
from ..data.quality_control import measure_cells
from ..data.read import matrix_rows, read_cells, read_gene_names
from ..evaluation.per_gene_mode import count_bins
from ..tokenization import InputError, ScBertTokenizer, align_genes
from ..tokenization.cells_scbert import feature_modalities
from ..tokenization.genes_scbert import MINIMUM_OVERLAP
from .cell_batches import CellDataset
from .cell_targets import bin_values, mean_cell
from .initial_model import new_tokenizer
from .pretrain_arguments import PretrainDataArguments
from .run_gene2vec import corpus_files

logger = logging.getLogger(__name__)

# scBERT's rule for the full panel; a small panel (or a panel of few expressed genes) would lose its cells
MIN_GENES = 200
PANEL_WITH_MIN_GENES = 5000
# folder of a corpus in which what was counted is kept
CACHE = "cache"
CELLS_AT_ONCE = 2048


@dataclass
class PretrainData:
    """
    Everything a pretraining run learns from.

    The bins that stand at each gene in the training cells are counted, [genes, vocabulary] int64. A file counts as
    measuring the genes that any of its cells expresses, bool [files, genes]. The report names cells and files taken and
    left out.
    """

    tokenizer: ScBertTokenizer
    train: CellDataset
    validation: CellDataset
    bin_counts: np.ndarray
    measured: np.ndarray
    report: dict[str, Any]

    def mean_cell(self) -> np.ndarray:
        """`mean_cell` of the training cells, [genes]."""
        files = self.train.files[self.train.rows]
        n_cells = np.bincount(files, minlength=len(self.measured))
        return mean_cell(self.bin_counts, bin_values(self.tokenizer), self.measured, n_cells)

    def cells_by_file(self, most: int = 5000) -> Iterator[sp.csr_matrix]:
        """Bins of the training cells of each file, [cells, genes]; of more than `most`, as many at random."""
        files = self.train.files[self.train.rows]
        for file in np.unique(files):
            rows = self.train.rows[files == file]
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:most])
            yield self.train.bins[rows]

    def fingerprint(self) -> int:
        """A checksum of panel, splits and training bins: a resumed run must have the same."""
        checksum = zlib.crc32("\n".join(self.tokenizer.gene_panel).encode())
        sizes = np.array([len(self.train), len(self.validation)], dtype=np.int64)
        return zlib.crc32(self.bin_counts.tobytes(), zlib.crc32(sizes.tobytes(), checksum))


def load_data(
    data: PretrainDataArguments, tokenizer: ScBertTokenizer | dict[str, Any], seed: int
) -> PretrainData:
    """
    Open the cells and put some aside for validation.

    A corpus, and files with ``streaming``, stay on disk; other files are binned into memory. All cells are binned once
    to find those with something to learn and to count bins; what was found of a corpus is kept in its folder ``cache``.
    The tokenizer is the base's, or options for a new one over the panel of the run. An `InputError` if the corpus is
    damaged, no file of it can be used, or too few cells are left.
    """
    cells, tokenizer, report, files = (_open_corpus if is_corpus(data.corpus) else _open_files)(
        data, tokenizer
    )
    minimum = data.min_genes
    if minimum is None:
        minimum = MIN_GENES if len(tokenizer.gene_panel) >= PANEL_WITH_MIN_GENES else 0
    # the first process writes the cache for the others
    with PartialState().local_main_process_first():
        lengths, counts, measured = _measured(cells, tokenizer, data.corpus, files)
    # a cell with nothing to ask for teaches nothing
    usable = np.flatnonzero(lengths >= max(1, minimum))
    n_validation = max(1, round(data.validation_fraction * len(usable)))
    if len(usable) <= n_validation:
        raise InputError(
            f"{len(usable)} cell(s) of {data.corpus} express {minimum} genes of the panel or more: too few to learn "
            "from and to validate on. Lower min_genes (--min-genes), or add cells."
        )
    order = np.random.default_rng(seed).permutation(len(usable))
    train, validation = (usable[np.sort(part)] for part in (order[n_validation:], order[:n_validation]))
    others = np.setdiff1d(np.arange(cells.shape[0]), train)
    counts = counts - _bin_counts(cells, tokenizer, others, files)[1]
    report["cells"] = {"train": len(train), "validation": len(validation)}
    report |= {"low_gene_cells": cells.shape[0] - len(usable), "min_genes": minimum}
    train, validation = (CellDataset(cells, rows=part, files=files) for part in (train, validation))
    return PretrainData(tokenizer, train, validation, counts, measured, report)


def _open_corpus(data: PretrainDataArguments, tokenizer: ScBertTokenizer | dict[str, Any]):
    """Cells of a corpus of ``scbert build-corpus``, the tokenizer, a report, and the number of every cell's file."""
    manifest = read_manifest(data.corpus)
    if data.layer or data.input != "auto":
        raise InputError(
            "A corpus holds one kind of values a file: layer and input (--layer, --values) were chosen when it was "
            "built. Leave them out."
        )
    if isinstance(tokenizer, dict):
        modalities = dict(zip(manifest["genes"], manifest["modalities"]))
        tokenizer = _tokenizer_of(tokenizer, data, modalities, manifest["genome_build"])
    overlap = align_genes(manifest["genes"], tokenizer.gene_panel)
    try:
        overlap.check(MINIMUM_OVERLAP, force=data.force)
    except InputError as problem:
        raise InputError(f"The corpus {data.corpus} does not suit the model's panel. {problem}") from None
    kept = {Path(source["path"]).name: {"cells": source["kept"]} for source in manifest["sources"]}
    report = {"corpus": str(data.corpus), "genes_found": overlap.n_matched, "files": kept}
    parts = [shards_of_source(source) for source in manifest["sources"]]
    files = np.repeat(np.arange(len(parts)), [sum(shard["cells"] for shard in part) for part in parts])
    return BinnedCells(open_corpus(data.corpus, tokenizer), tokenizer), tokenizer, report, files


def _open_files(data: PretrainDataArguments, tokenizer: ScBertTokenizer | dict[str, Any]):
    """Like `_open_corpus` of one or several files; those that cannot be used are named and left out."""
    files = corpus_files(data.corpus)
    # a panel of all the files' genes is wider than each of them
    overlap = 0.0 if isinstance(tokenizer, dict) and not data.genes else MINIMUM_OVERLAP
    if isinstance(tokenizer, dict):
        genes = {} if data.genes else _expressed_genes(files, data.layer)
        genome_build = common_build(files) if any(genes.values()) else None
        tokenizer = _tokenizer_of(tokenizer, data, genes, genome_build)
    parts, sizes, report = [], [], {"files": {}, "left_out": {}}
    for path in files:
        try:
            part = _open_file(path, data, tokenizer, overlap)
        except InputError as problem:
            if len(files) == 1:
                raise
            logger.warning("%s is left out: %s", path.name, problem)
            report["left_out"][path.name] = str(problem)
            continue
        parts.append(part)
        sizes.append(part.n_cells if data.streaming else part.shape[0])
        report["files"][path.name] = {"cells": sizes[-1]}
    if not parts:
        raise InputError(f"No file of {data.corpus} can be used; all were left out, as named above.")
    cells = BinnedCells(parts, tokenizer) if data.streaming else sp.vstack(parts, format="csr")
    return cells, tokenizer, report, np.repeat(np.arange(len(parts)), sizes)


def _open_file(path: Path, data: PretrainDataArguments, tokenizer: ScBertTokenizer, overlap: float):
    """A file left on disk, or its bins."""
    if data.streaming:
        part = CellFile(path, tokenizer, data.layer, data.input)
        part.alignment.check(overlap, force=data.force)
        return part
    adata = read_cells(path, layer=data.layer)
    tokenizer.align(adata, layer=data.layer).check(overlap, force=data.force)
    return tokenizer.bin_cells(adata, input=data.input, layer=data.layer)


def _expressed_genes(files: list[Path], layer: str | None) -> dict[str, int]:
    """Modality of every gene with a count anywhere, in order of appearance; read in chunks."""
    found: dict[str, int] = {}
    for path in files:
        try:
            adata = read_cells(path, layer=layer, backed=True)
            expressed = measure_cells(adata, layer).cells_per_gene > 0
            names = matrix_rows(adata, layer)[1]
        except InputError:
            # said when the file is opened
            continue
        ids = feature_modalities(adata.var) if len(names) == adata.n_vars else None
        ids = np.zeros(len(names), dtype=int) if ids is None else ids
        for name, is_seen, modality in zip(names, expressed, ids.tolist()):
            if is_seen or name in found:
                found[name] = modality
    return found


def _tokenizer_of(
    options: dict[str, Any], data: PretrainDataArguments, genes: dict[str, int], genome_build: str | None
) -> ScBertTokenizer:
    """A tokenizer over the panel file, or over these genes, whose modalities are known."""
    panel = read_gene_names(data.genes) if data.genes else list(genes)
    if not panel:
        raise InputError(f"No gene is expressed in any cell of {data.corpus}.")
    if not data.genes:
        logger.info("The panel is the %d genes the corpus expresses; a panel file gives another.", len(panel))
    modalities = [genes.get(name, 0) for name in panel] if any(genes.values()) else None
    return new_tokenizer(options, panel, modalities, genome_build)


def _measured(
    cells: Any, tokenizer: ScBertTokenizer, corpus: str, files: np.ndarray
) -> tuple[np.ndarray, ...]:
    """`_bin_counts` of all cells, from the cache of a corpus where it is known."""
    everything = np.arange(cells.shape[0])
    if not is_corpus(corpus):
        return _bin_counts(cells, tokenizer, everything, files, shown=True)
    options = {name: value for name, value in tokenizer.init_kwargs.items() if name != "gene_panel_file"}
    # the manifest holds the checksums of all shards
    facts = ["by file", (Path(corpus) / "corpus.json").read_text(), sorted(map(str, options.items()))]
    key = hashlib.sha256(json.dumps([*facts, tokenizer.gene_panel]).encode()).hexdigest()[:16]
    path = Path(corpus) / CACHE / f"bins-{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            return stored["lengths"], stored["counts"], stored["measured"]
    lengths, counts, measured = _bin_counts(cells, tokenizer, everything, files, shown=True)
    if os.access(corpus, os.W_OK):
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as handle:
            np.savez_compressed(handle, lengths=lengths, counts=counts, measured=measured)
    return lengths, counts, measured


def _bin_counts(
    cells: Any, tokenizer: ScBertTokenizer, rows: np.ndarray, files: np.ndarray, shown: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Of the cells at `rows`: expressed genes of each [rows], how often each bin stands at each gene [genes, vocabulary],
    and which genes are expressed in each of the `files` [files, genes].
    """
    lengths = np.zeros(len(rows), dtype=np.int64)
    counts = np.zeros((len(tokenizer.gene_panel), tokenizer.vocab_size), dtype=np.int64)
    measured = np.zeros((files[-1] + 1, len(counts)), dtype=bool)
    with tqdm(total=len(rows), desc="counting bins", unit=" cells", disable=None if shown else True) as bar:
        for start in range(0, len(rows), CELLS_AT_ONCE):
            taken = rows[start : start + CELLS_AT_ONCE]
            bins = cells[taken]
            lengths[start : start + bins.shape[0]] = np.diff(bins.indptr)
            counts += count_bins(bins, tokenizer.vocab_size)
            measured[np.repeat(files[taken], np.diff(bins.indptr)), bins.indices] = True
            bar.update(bins.shape[0])
    return lengths, counts, measured
