"""gene2vec: gene vectors from co-expression, written, read and put into a model's gene table.

Source: Du et al., "Gene2vec: distributed representation of genes based on co-expression",
BMC Genomics 2019 (doi 10.1186/s12864-018-5370-x).
"""

import gzip
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data.paths import atomic_path
from ..tokenization import InputError
from .coexpression import GenePairs

logger = logging.getLogger(__name__)

# a gene needs to stand in so many pairs
MIN_PAIRS = 5
NEGATIVE_SAMPLES = 5


@dataclass
class GeneVectors:
    """Gene symbols and their vectors, `matrix` [genes, size] float32."""

    genes: list[str]
    matrix: np.ndarray


class _ShuffledPairs:
    """Two-word sentences in a new order every time they are read."""

    def __init__(self, pairs: GenePairs, seed: int, progress=lambda n_pairs: None):
        self.genes = pairs.genes
        self.pairs = pairs.pairs
        self.seed = seed
        self.readings = 0
        self.progress = progress

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.readings)).permutation(len(self.pairs))
        self.readings += 1
        for start in range(0, len(order), 10_000):
            chunk = self.pairs[order[start : start + 10_000]].tolist()
            for first, second in chunk:
                yield [self.genes[first], self.genes[second]]
            self.progress(len(chunk))


def train_gene2vec(
    pairs: GenePairs,
    size: int = 200,
    iterations: int = 10,
    seed: int = 0,
    workers: int = 1,
    progress=lambda n_pairs: None,
) -> GeneVectors:
    """Train skip-gram word2vec (window 1) on co-expressed pairs as two-word sentences.

    The pairs are shuffled anew for each iteration; results repeat exactly with one worker only. `progress` is told how
    many pairs were read since it was last called: they are read `iterations + 1` times, once to count the genes. Genes
    come in order of how many pairs they stand in; if none stands in five, that is an `InputError`.

    Examples
    --------
    >>> pairs = GenePairs(["A", "B", "C"], np.array([[0, 1], [1, 2]] * 10), np.ones(20))
    >>> train_gene2vec(pairs, size=4, iterations=1).matrix.shape
    (3, 4)
    """
    from gensim.models import Word2Vec

    uses = np.bincount(pairs.pairs.ravel(), minlength=len(pairs.genes))
    if not np.any(uses >= MIN_PAIRS):
        ladder = ", ".join(f"{count:,} at {level}" for level, count in sorted(pairs.pairs_above.items()))
        raise InputError(
            f"{len(pairs.pairs):,} gene pairs are correlated enough and no gene stands in {MIN_PAIRS} of them, so "
            "there is nothing to train on. Single cells correlate less than bulk samples: lower --cutoff or keep the "
            f"strongest pairs with --top-pairs. Pairs there are: {ladder or 'none'}."
        )
    logging.getLogger("gensim").setLevel(logging.WARNING)
    skip_gram = {"sg": 1, "hs": 0, "window": 1, "min_count": MIN_PAIRS, "negative": NEGATIVE_SAMPLES}
    model = Word2Vec(vector_size=size, seed=seed, workers=workers, **skip_gram)
    sentences = _ShuffledPairs(pairs, seed, progress)
    model.build_vocab(sentences)
    model.train(sentences, total_examples=model.corpus_count, epochs=iterations)
    return GeneVectors(list(model.wv.index_to_key), np.asarray(model.wv.vectors, dtype=np.float32))


def save_gene_vectors(vectors: GeneVectors, path) -> None:
    """Write vectors as word2vec text, or as `.npy` with the genes beside it in `.genes.txt`.

    Text is compressed where the name ends in `.gz`. An existing file is replaced; the new one appears under its name
    only when complete.
    """
    path = Path(path)
    if path.suffix == ".npy":
        with atomic_path(_gene_list_of(path), overwrite=True) as partial:
            partial.write_text("\n".join(vectors.genes) + "\n")
    with atomic_path(path, overwrite=True) as partial:
        if path.suffix == ".npy":
            with open(partial, "wb") as file:
                np.save(file, vectors.matrix)
            return
        with (gzip.open if path.suffix == ".gz" else open)(partial, "wt") as file:
            file.write(f"{len(vectors.genes)} {vectors.matrix.shape[1]}\n")
            for gene, row in zip(vectors.genes, vectors.matrix):
                file.write(gene + " " + " ".join(f"{value:.7g}" for value in row) + "\n")


def load_gene_vectors(path, genes=None) -> GeneVectors:
    """Read gene vectors from word2vec text (`.gz` too), `SYMBOL<TAB>numbers` lines, or `.npy` [genes, size].

    The list of an `.npy` has one symbol per line, and by default the same name ending in `.genes.txt`. A symbol that
    stands twice keeps its first vector. Lines of unlike length, numbers that are not finite, or a list of another
    length are an `InputError`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path} of gene vectors.")
    names, matrix = _read_npy(path, genes) if path.suffix == ".npy" else _read_text(path)
    if not np.isfinite(matrix).all():
        bad = names[int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])]
        raise InputError(f"The vector of {bad} in {path} holds a number that is not finite; mend the file.")
    first = np.sort(np.unique(names, return_index=True)[1])
    if len(first) < len(names):
        logger.warning("%d repeated symbols in %s keep their first vector.", len(names) - len(first), path)
        names, matrix = [names[row] for row in first], matrix[first]
    return GeneVectors(names, matrix)


def _gene_list_of(path: Path) -> Path:
    return path.with_suffix(".genes.txt")


def _read_npy(path: Path, genes) -> tuple[list[str], np.ndarray]:
    listed = Path(genes) if genes is not None else _gene_list_of(path)
    if not listed.exists():
        raise InputError(f"{path} needs a list of its genes, one symbol a line; {listed} does not exist.")
    names = listed.read_text().split()
    try:
        matrix = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} is not a plain numpy array: {error}.") from error
    if matrix.ndim != 2 or len(matrix) != len(names):
        raise InputError(
            f"{path} holds an array of shape {matrix.shape} and {listed} {len(names):,} genes; "
            "one row per gene is needed."
        )
    return names, matrix.astype(np.float32)


def _read_text(path: Path) -> tuple[list[str], np.ndarray]:
    names, rows, size = [], [], None
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if not fields or (number == 1 and len(fields) == 2 and all(f.isdigit() for f in fields)):
                    continue
                row = np.array(fields[1:], dtype=np.float32)
                if size is not None and len(row) != size:
                    raise InputError(f"Line {number} of {path} holds {len(row)} numbers, the others {size}.")
                size = len(row)
                names.append(fields[0])
                rows.append(row)
    except InputError:
        raise
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(
            f"Line {len(rows) + 1} or so of {path} is not `SYMBOL numbers` ({error}); word2vec text or "
            "one SYMBOL<TAB>numbers line per gene is needed."
        ) from error
    if not rows or not size:
        raise InputError(f"{path} holds no gene vectors; `SYMBOL numbers` lines are needed.")
    return names, np.stack(rows)


def assign_gene_vectors(model, panel, vectors: GeneVectors, seed: int = 0) -> dict[str, int]:
    """Put gene vectors into a model's gene table by symbol.

    The table [genes + 1, hidden_size] is written in place. The panel is a list of symbols or a tokenizer. Genes without
    a vector are drawn from a normal distribution with the deviation of the assigned vectors; the row of the trailing
    token stays zero. Vectors of another size, another panel than the table's, or no gene in common are an `InputError`.
    """
    genes = list(getattr(panel, "gene_panel", panel))
    table = model.base_model.embeddings.gene_embeddings.weight
    if table.shape[0] != len(genes) + 1:
        raise InputError(
            f"The panel has {len(genes):,} genes and the model's gene table {table.shape[0]:,} rows; "
            "a table has one row more than its panel."
        )
    found, needed = vectors.matrix.shape[1], table.shape[1]
    if found != needed:
        raise InputError(
            f"The gene vectors are {found} numbers long, and the model is {needed} wide. Train vectors of its width "
            f"(size={needed}, or `scbert gene2vec --size {needed}`), or a model of theirs: a recipe with "
            f'{{"model": {{"hidden_size": {found}}}}}.'
        )
    rows = pd.Index(vectors.genes, dtype=object).get_indexer(genes)
    assigned, missing = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    if not len(assigned):
        raise InputError(
            f"No gene of the panel (first: {', '.join(genes[:3])}) has a vector (first: "
            f"{', '.join(vectors.genes[:3])}); both need to name genes alike."
        )
    values = np.zeros(table.shape, dtype=np.float32)
    values[assigned] = vectors.matrix[rows[assigned]]
    deviation = float(values[assigned].std())
    values[missing] = np.random.default_rng(seed).normal(0.0, deviation, (len(missing), values.shape[1]))
    with torch.no_grad():
        table.copy_(torch.from_numpy(values))
    unused = len(vectors.genes) - len(np.unique(rows[assigned]))
    logger.warning(
        f"Gene vectors: {len(assigned):,} genes took their vector, {len(missing):,} had none and were initialised at "
        f"random, {unused:,} vectors belong to no gene of the panel."
    )
    return {"assigned": len(assigned), "initialised": len(missing), "unused": unused}
