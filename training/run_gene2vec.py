"""The job behind `scbert gene2vec`: a corpus or a foreign file in, a file of gene vectors out."""

import logging
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..data.corpus_manifest import is_corpus
from ..data.corpus_sources import files_in
from ..data.corpus_stream import CorpusPart, corpus_parts
from ..data.paths import check_cells_path, check_output_path, is_10x_folder, is_zarr
from ..data.read import read_cells, read_gene_names, to_counts_scale
from ..tokenization import InputError, detect_input_kind, gene_names_of, normalize_expression, select_matrix
from ..tokenization.expression_scbert import as_csr
from .coexpression import GenePairs, coexpressed_pairs, join_pairs
from .gene2vec import load_gene_vectors, save_gene_vectors, train_gene2vec

logger = logging.getLogger(__name__)


def gene2vec(
    output,
    corpus=None,
    import_file=None,
    genes=None,
    size: int = 200,
    cutoff: float | None = None,
    top_pairs: int | None = None,
    min_cells: int = 20,
    max_cells: int = 20_000,
    iterations: int = 10,
    layer: str | None = None,
    input: str = "auto",
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
) -> dict:
    """Train gene vectors on the co-expression in a corpus, or bring a foreign file into our format.

    Correlations are taken within each file and the pairs joined, so that differences between studies
    are not mistaken for co-expression.

    The output is word2vec text (`.gz` too) or `.npy`. A corpus is one of `scbert build-corpus`, a file of cells or a
    folder of them; a foreign file, what `load_gene_vectors` reads, with `genes` as the list of an `.npy`; else `genes`
    is a panel to keep to. The limits of pairs are of each file, as in `coexpressed_pairs`; the cutoff is 0.9 where
    neither it nor `top_pairs` is given. Files of more than `max_cells` are sampled. The rest is as in
    `train_gene2vec`. What is returned is said of the output, and the ladder of pairs above each cutoff.
    """
    output = Path(output)
    if (corpus is None) == (import_file is None):
        raise InputError("Give either a corpus to train on or --import FILE with vectors to bring in.")
    check_output_path(output, overwrite, inputs=(corpus, import_file))
    if import_file is not None:
        vectors = load_gene_vectors(import_file, genes)
        save_gene_vectors(vectors, output)
        return _summary(output, vectors)
    if cutoff is None and top_pairs is None:
        cutoff = 0.9
    panel = None if genes is None else set(read_gene_names(genes))
    limits = {"cutoff": cutoff, "top_pairs": top_pairs, "min_cells": min_cells}
    source = {"panel": panel, "layer": layer, "input": input, "max_cells": max_cells, "seed": seed}
    files = corpus_parts(corpus) if is_corpus(corpus) else corpus_files(corpus)
    parts, skipped = _pairs_of_files(files, source, limits)
    pairs = join_pairs(parts)
    with tqdm(total=(iterations + 1) * len(pairs.pairs), unit=" pairs", desc="training gene2vec") as bar:
        vectors = train_gene2vec(
            pairs, size=size, iterations=iterations, seed=seed, workers=workers, progress=bar.update
        )
    save_gene_vectors(vectors, output)
    ladder = {str(level): count for level, count in sorted(pairs.pairs_above.items())}
    found = {"pairs": len(pairs.pairs), "pairs_above": ladder}
    return {**_summary(output, vectors), "files": len(parts), "skipped": skipped, **found}


def _pairs_of_files(files: list[Path], source: dict, limits: dict) -> tuple[list[GenePairs], list[str]]:
    """Pairs of every file that can be used, and the names of those that cannot."""
    parts, skipped = [], []
    for path in files:
        try:
            expression, names = read_log_expression(path, **source)
        except InputError as problem:
            if len(files) == 1:
                raise
            logger.warning("%s is left out: %s", path.name, problem)
            skipped.append(path.name)
            continue
        with tqdm(total=None, unit=" genes", desc=f"correlating {path.name}") as bar:
            parts.append(coexpressed_pairs(expression, names, progress=bar.update, **limits))
    if not parts:
        raise InputError(f"None of the {len(skipped)} files can be used, for the reasons named above.")
    return parts, skipped


def corpus_files(corpus) -> list[Path]:
    """The files of cells of a corpus: itself, or those in the folder, by name; an `InputError` if it holds none."""
    corpus = Path(corpus)
    if not corpus.is_dir() or is_zarr(corpus) or is_10x_folder(corpus):
        return [check_cells_path(corpus)]
    return files_in(corpus)


def read_log_expression(path, panel, layer, input, max_cells, seed):
    """Log-normalised expression of one file (or `CorpusPart`), [cells, genes] CSR, and its gene names.

    Other genes than the panel's are left out, and the size factor is taken after that, as in the model's own input. A
    file of more than `max_cells` is sampled.
    """
    if isinstance(path, CorpusPart):
        if layer or input != "auto":
            raise InputError("--layer and --values belong to build-corpus: the corpus knows what it holds.")
        values, names, kind = path.sample(max_cells, seed)
    else:
        values, names, kind = _sample_file(path, layer, input, max_cells, seed)
    values, names = to_counts_scale(values, kind), np.asarray(names, dtype=object)
    first = ", ".join(map(str, names[:3]))
    if panel is not None:
        kept = np.flatnonzero([name in panel for name in names])
        values, names = values[:, kept], names[kept]
    if len(names) < 2:
        raise InputError(f"It names {len(names)} genes of the panel (its first names: {first}).")
    return normalize_expression(values.tocsr()), names


def _sample_file(path, layer, input, max_cells, seed):
    adata = read_cells(path, layer=layer, backed=True, check=False)
    matrix, source = select_matrix(adata, layer)
    rows = np.random.default_rng(seed).permutation(matrix.shape[0])[:max_cells]
    values = as_csr(matrix[np.sort(rows)])
    kind = detect_input_kind(values) if input == "auto" else input
    return values, gene_names_of(source.var, source.var_names), kind


def _summary(output: Path, vectors) -> dict:
    return {"output": str(output), "genes": len(vectors.genes), "size": int(vectors.matrix.shape[1])}
