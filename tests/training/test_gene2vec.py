import gzip
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertModel
from scbert.tokenization import InputError
from scbert.training.coexpression import GenePairs, coexpressed_pairs, join_pairs
from scbert.training.gene2vec import (
    GeneVectors,
    assign_gene_vectors,
    load_gene_vectors,
    save_gene_vectors,
    train_gene2vec,
)
from scbert.training.run_gene2vec import corpus_files


@pytest.fixture
def expression():
    """Cells whose genes fall into three programmes of ten genes, and ten genes of their own."""
    rng = np.random.default_rng(0)
    programmes = rng.gamma(1.0, 2.0, (300, 3)).repeat(10, axis=1)
    own = rng.gamma(1.0, 2.0, (300, 10))
    counts = rng.poisson(np.hstack([programmes, own]))
    return sp.csr_matrix(np.log2(1.0 + counts)), [f"G{i}" for i in range(40)]


def as_dict(found):
    return {tuple(pair): value for pair, value in zip(found.pairs.tolist(), found.correlations)}


@pytest.mark.parametrize("block_bytes", [1, 4 * 40 * 7, 2**20])
def test_correlations_equal_numpy_whatever_the_block(expression, block_bytes, monkeypatch):
    monkeypatch.setattr("scbert.training.coexpression.BLOCK_BYTES", block_bytes)
    matrix, names = expression
    found = coexpressed_pairs(matrix, names, cutoff=-1.0)
    wanted = np.corrcoef(matrix.toarray().T)
    assert len(found.pairs) == 40 * 39 // 2
    for (i, j), value in as_dict(found).items():
        assert i < j and value == pytest.approx(wanted[i, j], abs=1e-5)
    assert found.pairs_above[0.3] == np.sum(np.triu(wanted, 1) >= 0.3)


def test_cells_are_streamed(expression, monkeypatch):
    matrix, names = expression
    whole = coexpressed_pairs(matrix, names, cutoff=0.2)
    monkeypatch.setattr("scbert.training.coexpression.CELLS_AT_ONCE", 7)
    np.testing.assert_allclose(
        coexpressed_pairs(matrix, names, cutoff=0.2).correlations, whole.correlations, atol=1e-5
    )


def test_top_pairs_are_the_strongest(expression, monkeypatch):
    monkeypatch.setattr("scbert.training.coexpression.BLOCK_BYTES", 4 * 40 * 3)
    matrix, names = expression
    every = coexpressed_pairs(matrix, names, cutoff=-1.0)
    top = coexpressed_pairs(matrix, names, cutoff=None, top_pairs=20)
    strongest = np.sort(every.correlations)[-20:]
    np.testing.assert_allclose(np.sort(top.correlations), strongest, atol=1e-6)


def test_rare_and_constant_genes_are_left_out():
    matrix = np.zeros((50, 4))
    matrix[0, :2] = 1.0
    matrix[:, 2] = 1.0
    matrix[:30, 3] = np.arange(1, 31)
    found = coexpressed_pairs(sp.csr_matrix(matrix), list("ABCD"), cutoff=0.5, min_cells=20)
    assert found.genes == ["D"] and len(found.pairs) == 0


def test_no_limit_is_refused(expression):
    with pytest.raises(InputError, match="cutoff"):
        coexpressed_pairs(*expression, cutoff=None)


def test_datasets_are_joined_by_name():
    one = GenePairs(["A", "B"], np.array([[0, 1]], np.int32), np.ones(1, np.float32), {0.9: 1})
    two = GenePairs(["B", "A", "C"], np.array([[0, 1], [0, 2]], np.int32), np.ones(2, np.float32), {0.9: 2})
    both = join_pairs([one, two])
    assert [(both.genes[i], both.genes[j]) for i, j in both.pairs] == [("A", "B"), ("B", "A"), ("B", "C")]
    assert both.pairs_above[0.9] == 3


def test_vectors_of_a_programme_lie_together_and_repeat(expression):
    pairs = coexpressed_pairs(*expression, cutoff=0.35)
    first = train_gene2vec(pairs, size=16, iterations=40)
    again = train_gene2vec(pairs, size=16, iterations=40)
    assert first.genes == again.genes
    np.testing.assert_array_equal(first.matrix, again.matrix)
    unit = first.matrix / np.linalg.norm(first.matrix, axis=1, keepdims=True)
    programme = np.array([int(gene[1:]) // 10 for gene in first.genes])
    same = programme[:, None] == programme
    cosine = unit @ unit.T
    assert cosine[same].mean() > cosine[~same].mean() + 0.1
    assert not np.array_equal(first.matrix, train_gene2vec(pairs, size=16, iterations=40, seed=1).matrix)


def test_pairs_are_shuffled_anew_each_time():
    from scbert.training.gene2vec import _ShuffledPairs

    pairs = GenePairs(list("ABCDEFGH"), np.arange(8, dtype=np.int32).reshape(4, 2).repeat(5, 0), np.ones(20))
    sentences = _ShuffledPairs(pairs, seed=0)
    first, second = list(sentences), list(sentences)
    assert first != second and sorted(first) == sorted(second)
    assert list(_ShuffledPairs(pairs, seed=0)) == first


def test_too_few_pairs_says_what_would_do(expression):
    pairs = coexpressed_pairs(*expression, cutoff=0.999)
    with pytest.raises(InputError, match=r"--top-pairs.* at 0\.3"):
        train_gene2vec(pairs, size=4)


@pytest.mark.parametrize("name", ["v.txt", "v.txt.gz", "v.npy"])
def test_saved_vectors_load_again(tmp_path, name):
    vectors = GeneVectors(["CD3D", "LYZ"], np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32))
    save_gene_vectors(vectors, tmp_path / name)
    loaded = load_gene_vectors(tmp_path / name)
    assert loaded.genes == vectors.genes
    np.testing.assert_allclose(loaded.matrix, vectors.matrix, rtol=1e-6)
    assert not list(tmp_path.glob(".*"))


def test_tab_separated_and_repeated_symbols(tmp_path, caplog):
    path = tmp_path / "gene2vec.tsv"
    path.write_text("A\t1\t2\nB\t3\t4\nA\t5\t6\n")
    loaded = load_gene_vectors(path)
    assert loaded.genes == ["A", "B"] and loaded.matrix[0].tolist() == [1, 2]
    assert "1 repeated" in caplog.text


@pytest.mark.parametrize(
    "text, problem",
    [
        ("A 1 2\nB 1\n", "Line 2"),
        ("A 1 x\n", "SYMBOL"),
        ("", "no gene vectors"),
        ("A 1 nan\n", "not finite"),
    ],
)
def test_broken_text_is_refused(tmp_path, text, problem):
    path = tmp_path / "broken.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
        load_gene_vectors(path)


def test_truncated_gzip_and_missing_gene_list_are_refused(tmp_path):
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(gzip.compress(b"A 1 2\n" * 1000)[:-10])
    with pytest.raises(InputError):
        load_gene_vectors(broken)
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    with pytest.raises(InputError, match="list of its genes"):
        load_gene_vectors(tmp_path / "v.npy")
    (tmp_path / "genes.txt").write_text("A\nB\n")
    with pytest.raises(InputError, match="2 genes"):
        load_gene_vectors(tmp_path / "v.npy", tmp_path / "genes.txt")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("model_class", [ScBertModel, ScBertForMaskedExpression])
def test_assignment_by_symbol(model_class, frozen, caplog):
    config = ScBertConfig(
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=4,
        num_random_features=8,
        intermediate_size=4,
        max_position_embeddings=4,
        freeze_gene_embeddings=frozen,
    )
    model = model_class(config)
    vectors = GeneVectors(["C", "X", "A"], np.arange(12, dtype=np.float32).reshape(3, 4))
    report = assign_gene_vectors(model, ["A", "B", "C"], vectors)
    table = model.base_model.embeddings.gene_embeddings.weight.detach().numpy()
    assert table[0].tolist() == [8, 9, 10, 11] and table[2].tolist() == [0, 1, 2, 3]
    assert np.any(table[1] != 0) and not table[3].any()
    assert report == {"assigned": 2, "initialised": 1, "unused": 1}
    assert "2 genes took" in caplog.text


@pytest.mark.parametrize(
    "panel, size, problem",
    [
        (["A", "B"], 4, "2 genes"),
        (["A", "B", "C"], 3, "3 numbers long, and the model is 4 wide"),
        (["x", "y", "z"], 4, "No gene"),
    ],
)
def test_wrong_vectors_are_refused(panel, size, problem):
    config = ScBertConfig(
        hidden_size=4, num_hidden_layers=0, num_attention_heads=1, head_dim=4, max_position_embeddings=4
    )
    with pytest.raises(InputError, match=problem):
        assign_gene_vectors(ScBertModel(config), panel, GeneVectors(["A"], np.ones((1, size), np.float32)))


MEMORY = """
import resource
import numpy as np
import scipy.sparse as sp
from scbert.training.coexpression import coexpressed_pairs

rng = np.random.default_rng(0)
cells = sp.random(3000, 20_000, 0.1, format="csr", dtype=np.float32, random_state=rng)
found = coexpressed_pairs(cells, [f"G{i}" for i in range(20_000)], cutoff=None, top_pairs=1_000_000)
assert len(found.pairs) == 1_000_000 and len(found.genes) == 20_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_twenty_thousand_genes_fit_into_four_gib():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4.0


def test_a_folder_of_cells_may_hold_10x_folders_and_mudata(tmp_path):
    (tmp_path / "sample").mkdir()
    wanted = [tmp_path / "cells.h5mu", tmp_path / "sample"]
    for path in (wanted[0], tmp_path / "sample" / "matrix.mtx.gz", tmp_path / "notes.txt"):
        path.touch()
    assert corpus_files(tmp_path) == wanted and corpus_files(wanted[1]) == wanted[1:]
