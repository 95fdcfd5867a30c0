"""Gene panels from corpora."""

import anndata
import numpy as np
import pandas as pd
import pytest

from corpus_panel import corpus_panel
from scbert.data.corpus_build import build_corpus
from scbert.tokenization import InputError, read_gene_panel


@pytest.fixture
def corpus(tmp_path):
    """Two files: A and B are expressed in many cells of both, C of one, D in a single cell."""
    for name, genes in (("one", "ABCD"), ("two", "BAD")):
        counts = np.random.default_rng(len(genes)).poisson(5, (20, len(genes))).astype(np.float32) + 1
        counts[1:, -1] = 0
        cells = anndata.AnnData(counts, var=pd.DataFrame(index=list(genes)))
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    build_corpus([tmp_path / "one.h5ad", tmp_path / "two.h5ad"], tmp_path / "corpus", min_genes=1)
    return tmp_path / "corpus"


def test_genes_of_enough_cells_of_enough_files(corpus, tmp_path):
    path = tmp_path / "panel.txt"
    assert corpus_panel(corpus, path, min_cells=5, min_files=2) == ["A", "B"] == read_gene_panel(path)
    assert corpus_panel(corpus, path, min_cells=5, min_files=1, overwrite=True) == ["A", "B", "C"]


def test_within_another_panel(corpus, tmp_path):
    (tmp_path / "other.txt").write_text("X\nB\nC\nA\n")
    found = corpus_panel(corpus, tmp_path / "panel.txt", tmp_path / "other.txt", min_cells=5, min_files=2)
    assert found == ["B", "A"]


def test_a_rule_that_no_gene_meets(corpus, tmp_path):
    with pytest.raises(InputError, match="100 cells of 2 files"):
        corpus_panel(corpus, tmp_path / "panel.txt", min_cells=100, min_files=2)
