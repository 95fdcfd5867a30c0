"""Genes that a file lacks, where the tokenizer knows the levels of all: sizes, files, and what they change."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scbert.tokenization import InputError, ScBertTokenizer
from scbert.training.finetune_arguments import FINETUNE
from scbert.training.run_finetune import load
from scbert.training.settings import parse

GENES = [f"GENE{i}" for i in range(6)]
LEVELS = [0.2, 1.4, 3.0, 0.0, 2.6, 1.0]


@pytest.fixture
def tokenizer():
    return ScBertTokenizer(gene_panel=GENES, gene_levels=LEVELS, keep_zeros=False)


def plain(tokenizer, **options):
    return ScBertTokenizer(gene_panel=GENES, keep_zeros=False, **options)


def test_nothing_changes_where_all_genes_are_there(tokenizer):
    counts = np.random.default_rng(0).poisson(3, (700, 6))
    for names in (GENES, GENES[::-1]):
        ours, theirs = (t.bin_cells(counts, gene_names=names) for t in (tokenizer, plain(tokenizer)))
        np.testing.assert_array_equal(ours.toarray(), theirs.toarray())


def test_absent_genes_have_their_level_and_leave_room_for_their_counts(tokenizer):
    """Reference: the share of the counts written out, and the bins of a tokenizer with that target sum."""
    present = [0, 1, 3, 5]
    counts = np.random.default_rng(0).poisson(3, (700, 4))
    counts[7] = 0
    of_level = 2.0 ** np.array(LEVELS) - 1
    share = of_level[present].sum() / of_level.sum()
    names = [GENES[i] for i in present]
    expected = plain(tokenizer, target_sum=1e4 * share).bin_cells(counts, gene_names=names).toarray()
    expected[:, 2], expected[:, 4] = 3, 3
    expected[7] = 0
    found = tokenizer.bin_cells(counts, gene_names=names)
    np.testing.assert_array_equal(found.toarray(), expected)
    assert found.dtype == np.int8 and found.has_sorted_indices


def test_levels_count_less_where_most_genes_are_absent(tokenizer):
    """Two genes of six: two thirds of a level, and of the logarithm of the share."""
    counts = np.random.default_rng(0).poisson(3, (20, 2)) + 1
    of_level = 2.0 ** np.array(LEVELS) - 1
    share = of_level[[0, 1]].sum() / of_level.sum()
    expected = (
        plain(tokenizer, target_sum=1e4 * share ** (2 / 3)).bin_cells(counts, gene_names=GENES[:2]).toarray()
    )
    expected[:, 2], expected[:, 4], expected[:, 5] = 2, 2, 1
    np.testing.assert_array_equal(tokenizer.bin_cells(counts, gene_names=GENES[:2]).toarray(), expected)


def test_logs_of_a_part_of_the_genes_keep_their_size(tokenizer):
    """Where the other genes were there when the logs were made, only levels come in."""
    counts = np.random.default_rng(0).poisson(30, (50, 6)).astype(float)
    logs = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))[:, :4]
    found, without = (
        t.bin_cells(sp.csr_matrix(logs), gene_names=GENES[:4], input="log1p").toarray()
        for t in (tokenizer, plain(tokenizer))
    )
    np.testing.assert_array_equal(found[:, :4], without[:, :4])
    assert (found[:, 4] == 3).all() and (found[:, 5] == 1).all()


def test_levels_travel_with_the_tokenizer(tokenizer, tmp_path):
    # more digits than the file has: they would make another bin of 2.5
    tokenizer.gene_levels = [*LEVELS[:4], 2.5004, 1.0]
    tokenizer.save_pretrained(tmp_path)
    again = ScBertTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.gene_levels, tokenizer.gene_levels)
    counts = np.random.default_rng(0).poisson(3, (20, 3))
    bins = [t.bin_cells(counts, gene_names=GENES[:3]).toarray() for t in (tokenizer, again)]
    np.testing.assert_array_equal(*bins)
    again.gene_levels = None
    # where levels were saved before, too
    for folder in (tmp_path / "none", tmp_path):
        again.save_pretrained(folder)
        assert not (folder / "gene_levels.txt").exists()
        assert ScBertTokenizer.from_pretrained(folder).gene_levels is None


@pytest.mark.parametrize(
    "levels, options, message",
    [
        ([1.0], {}, "6 genes"),
        ([9.0] * 6, {}, "from 0 to 5"),
        ([float("nan")] * 6, {}, "from 0 to 5"),
        (LEVELS, {"binning": "quantile"}, "binning='floor'"),
        (LEVELS, {"feature_modalities": [0, 0, 0, 1, 1, 1]}, "one modality"),
    ],
)
def test_levels_that_cannot_be(levels, options, message):
    with pytest.raises(InputError, match=message):
        ScBertTokenizer(gene_panel=GENES, gene_levels=levels, **options)


def test_a_file_of_levels_that_is_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "gene_levels.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"gene_levels\.txt must hold one number per line"):
        ScBertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("n_cells", range(2, 12))
def test_levels_of_a_gene_that_is_always_in_the_highest_bin(n_cells):
    """The mean of equal bins is not always that bin to the last digit."""
    cells = anndata.AnnData(np.full((n_cells, 1), 500.0, dtype=np.float32))
    cells.var_names = ["CD3E"]
    cells.obs["cell_type"] = (["A", "B"] * n_cells)[:n_cells]
    given = {"reference": "cells", "label_key": "cell_type", "output": "nowhere", "device": "cpu"}
    _, data, model, training = parse(FINETUNE, given | {"input": "counts"})
    tokenizer = load(data, model, training, reference=cells).tokenizer
    assert tokenizer.gene_levels.tolist() == [18.0]
