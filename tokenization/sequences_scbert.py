"""Rows of expression bins to sequences: of every gene, or of the expressed ones, padded."""

import zlib

import numpy as np

from .expression_scbert import keep_values


def encode_every_gene(bins):
    """All genes of the panel in order, then the trailing token: ``input_ids``, int64 [cells, panel + 1]."""
    input_ids = np.zeros((bins.shape[0], bins.shape[1] + 1), dtype=np.int64)
    rows = np.repeat(np.arange(bins.shape[0]), np.diff(bins.indptr))
    input_ids[rows, bins.indices] = bins.data
    return {"input_ids": input_ids}


def encode_expressed(bins, width=None):
    """Expressed genes of each cell in panel order, the trailing token, then pads, to a length of `width` at least.

    ``input_ids``, ``gene_ids`` and ``attention_mask`` are int64 [cells, length]; pads and the trailing token have id 0
    and the gene id ``panel``.
    """
    lengths = np.diff(bins.indptr)
    shape = (bins.shape[0], max(int(lengths.max(initial=0)) + 1, width or 0))
    rows = np.repeat(np.arange(bins.shape[0]), lengths)
    places = np.arange(bins.nnz) - np.repeat(bins.indptr[:-1], lengths)
    input_ids = np.zeros(shape, dtype=np.int64)
    gene_ids = np.full(shape, bins.shape[1], dtype=np.int64)
    input_ids[rows, places] = bins.data
    gene_ids[rows, places] = bins.indices
    attention_mask = (np.arange(shape[1]) <= lengths[:, None]).astype(np.int64)
    return {"input_ids": input_ids, "gene_ids": gene_ids, "attention_mask": attention_mask}


def subsample(bins, max_length, seed=0, generator=None):
    """Rows cut to ``max_length - 1`` random genes, in panel order: the trailing token needs a place too.

    The subset depends on the cell and `seed` alone, or is drawn anew by a `generator`.
    """
    if max_length is None or np.diff(bins.indptr).max(initial=0) < max_length:
        return bins
    kept = np.ones(bins.nnz, dtype=bool)
    for start, stop in zip(bins.indptr[:-1], bins.indptr[1:]):
        excess = stop - start - (max_length - 1)
        if excess > 0:
            rng = generator or _cell_generator(bins.indices[start:stop], bins.data[start:stop], seed)
            kept[start + rng.choice(stop - start, excess, replace=False)] = False
    return keep_values(bins, kept)


def _cell_generator(indices, values, seed):
    """A generator of the cell itself: its subset is the same in any batch and any order."""
    content = zlib.crc32(values.astype(np.int16).tobytes(), zlib.crc32(indices.astype(np.int32).tobytes()))
    return np.random.default_rng([seed, content])
