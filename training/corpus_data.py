"""Cells of a pretraining run that stay on disk: a corpus of `scbert build`, or files read as they are."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.corpus_manifest import is_corpus, read_manifest
from ..data.corpus_stream import BinnedCells, CellFile, open_corpus
from ..data.multiomics import common_build
from ..data.quality_control import measure_cells
from ..data.read import matrix_rows, read_cells, read_gene_names
from ..data.write_output import atomic_file
from ..tokenization import InputError, ScBertTokenizer, align_genes
from ..tokenization.genes_scbert import MINIMUM_OVERLAP
from .pretrain_arguments import PretrainDataArguments
from .pretrain_data import PretrainData, count_bins, least_genes
from .run_gene2vec import corpus_files

logger = logging.getLogger(__name__)

CACHE = "cache"


def load_corpus_data(
    data: PretrainDataArguments, tokenizer: ScBertTokenizer | dict[str, Any], seed: int
) -> PretrainData:
    """
    Open a corpus (or files, with ``streaming``) and put some cells aside for validation; nothing is held in memory.

    All cells are binned once to find those with something to learn and to count bins; what was found is kept in the
    folder ``cache`` of the corpus.

    Parameters
    ----------
    data, tokenizer, seed
        As in `load_pretrain_data`.

    Raises
    ------
    InputError
        If the corpus is damaged, has too few genes of the panel, or too few cells are left.
    """
    build = _corpus_cells if is_corpus(data.corpus) else _file_cells
    cells, tokenizer, report = build(data, tokenizer)
    minimum = least_genes(data.min_genes, tokenizer)
    # the first process writes the cache for the others
    with PartialState().local_main_process_first():
        lengths, counts = _measured(cells, data.corpus)
    usable = np.flatnonzero(lengths >= max(1, minimum))
    n_validation = max(1, round(data.validation_fraction * len(usable)))
    if len(usable) <= n_validation:
        raise InputError(
            f"{len(usable)} cell(s) of {data.corpus} express {minimum} genes of the panel or more (--min-genes): "
            f"too few to learn from and to validate on."
        )
    order = np.random.default_rng(seed).permutation(len(usable))
    train, validation = (
        cells.subset(usable[np.sort(part)]) for part in (order[n_validation:], order[:n_validation])
    )
    unused = cells.subset(np.setdiff1d(np.arange(len(cells)), train.rows))
    counts = counts - _bin_counts(unused)[1]
    report["cells"] = {"train": len(train), "validation": len(validation)}
    report |= {"poor_cells": len(cells) - len(usable), "min_genes": minimum}
    return PretrainData(tokenizer, train, validation, counts, report)


def _corpus_cells(data, tokenizer):
    manifest = read_manifest(data.corpus)
    if data.layer or data.input != "auto":
        raise InputError(
            "--layer and --input belong to scbert build: a corpus holds one kind of values a file."
        )
    if isinstance(tokenizer, dict):
        modalities = dict(zip(manifest["genes"], manifest["modalities"]))
        tokenizer = _new_tokenizer(tokenizer, data, manifest["genes"], modalities, manifest["genome_build"])
    overlap = align_genes(manifest["genes"], tokenizer.gene_panel)
    try:
        overlap.check(MINIMUM_OVERLAP, force=data.force)
    except InputError as problem:
        raise InputError(f"The corpus {data.corpus} does not suit the model's panel. {problem}") from None
    report = {"corpus": str(data.corpus), "genes_found": overlap.n_matched, "files": {}}
    for source in manifest["sources"]:
        report["files"][Path(source["path"]).name] = {"cells": source["kept"]}
    return BinnedCells(open_corpus(data.corpus, tokenizer), tokenizer), tokenizer, report


def _file_cells(data, tokenizer):
    files = corpus_files(data.corpus)
    # a panel of all the files' genes is wider than each of them
    minimum = 0.0 if isinstance(tokenizer, dict) and not data.genes else MINIMUM_OVERLAP
    if isinstance(tokenizer, dict):
        genes = None if data.genes else _expressed_genes(files, data.layer)
        tokenizer = _new_tokenizer(tokenizer, data, genes, {}, common_build(files))
    parts, report = [], {"files": {}, "left_out": {}}
    for path in files:
        try:
            part = CellFile(path, tokenizer, data.layer, data.input)
            part.alignment.check(minimum, force=data.force)
        except InputError as problem:
            if len(files) == 1:
                raise
            logger.warning("%s is left out: %s", path.name, problem)
            report["left_out"][path.name] = str(problem)
            continue
        parts.append(part)
        report["files"][path.name] = {"cells": part.n_cells}
    if not parts:
        raise InputError(f"No file of {data.corpus} can be used; all were left out, as named above.")
    return BinnedCells(parts, tokenizer), tokenizer, report


def _expressed_genes(files, layer):
    """Genes with a count anywhere, in order of appearance; read in chunks."""
    found = {}
    for path in files:
        try:
            adata = read_cells(path, layer=layer, backed=True)
            expressed = measure_cells(adata, layer).cells_per_gene > 0
            names = matrix_rows(adata, layer)[1]
        except InputError:
            # said when the file is opened
            continue
        found.update(dict.fromkeys(name for name, is_seen in zip(names, expressed) if is_seen))
    return list(found)


def _new_tokenizer(options, data, genes, modalities, genome_build):
    panel = read_gene_names(data.genes) if data.genes else genes
    if any(modalities.values()):
        options = {**options, "feature_modalities": [modalities.get(name, 0) for name in panel]}
        options["genome_build"] = genome_build
    if not data.genes:
        logger.info("The panel is the %d genes the corpus expresses; --genes FILE gives another.", len(panel))
    try:
        return ScBertTokenizer(gene_panel=panel, **options)
    except TypeError as error:
        raise InputError(f"The recipe's tokenizer options do not work: {error}.") from error


def _measured(cells, corpus):
    """`_bin_counts` of all cells, from the cache of a corpus where it is known."""
    if not is_corpus(corpus):
        return _bin_counts(cells, shown=True)
    options = {
        name: value for name, value in cells.tokenizer.init_kwargs.items() if name != "gene_panel_file"
    }
    # the manifest holds the checksums of all shards
    facts = [(Path(corpus) / "corpus.json").read_text(), sorted(map(str, options.items()))]
    key = hashlib.sha256(json.dumps([*facts, cells.tokenizer.gene_panel]).encode()).hexdigest()[:16]
    path = Path(corpus) / CACHE / f"bins-{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            return stored["lengths"], stored["counts"]
    lengths, counts = _bin_counts(cells, shown=True)
    if os.access(corpus, os.W_OK):
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as handle:
            np.savez_compressed(handle, lengths=lengths, counts=counts)
    return lengths, counts


def _bin_counts(cells, shown=False):
    """Bins of every cell [cells], and how often each bin stands at each gene [genes, vocabulary]."""
    tokenizer = cells.tokenizer
    lengths = [np.zeros(0, dtype=np.int64)]
    counts = np.zeros((len(tokenizer.gene_panel), tokenizer.vocab_size), dtype=np.int64)
    with tqdm(total=len(cells), desc="counting bins", unit=" cells", disable=None if shown else True) as bar:
        for bins in cells.iter_bins():
            lengths.append(np.diff(bins.indptr))
            counts += count_bins(bins, tokenizer.vocab_size)
            bar.update(bins.shape[0])
    return np.concatenate(lengths), counts
