"""The whole way in, on the real cells named by SCBERT_CELLS."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from scbert.data.read import read_cells
from scbert.data.read_gene_table import load_gene_table
from scbert.tokenization import ScBertTokenizer, map_genes, read_gene_panel

pytestmark = pytest.mark.shared

CELLS = Path(os.environ.get("SCBERT_CELLS", "."))
RNA_COUNTS = ["pbmc3k_10x", "zheng_facs_pbmc", "scmixology_celseq_dropseq", "kang_pbmc_ctrl_stim"]


@pytest.fixture(scope="module")
def tokenizer():
    return ScBertTokenizer(gene_panel=read_gene_panel(CELLS / "tables" / "scbert_gene_order_16906.txt.gz"))


@pytest.mark.parametrize("name", RNA_COUNTS)
def test_log1p_of_real_counts_gives_their_ids(tokenizer, name):
    adata = read_cells(CELLS / f"{name}.h5ad")
    bins = tokenizer.bin_cells(adata)
    size = 1e4 / np.asarray(adata.X.sum(1), dtype=np.float32)
    logged = sp.csr_matrix(adata.X.multiply(size), dtype=np.float32)
    np.log1p(logged.data, out=logged.data)
    assert (tokenizer.bin_cells(logged, gene_names=adata.var_names) != bins).nnz == 0


@pytest.mark.parametrize("table", ["hgnc_complete_set_2018-11.txt.gz", "Homo_sapiens.gene_info.gz"])
def test_gene_tables_find_more_genes_and_lose_none(tokenizer, table):
    adata = read_cells(CELLS / "pbmc3k_10x.h5ad")
    mapping = map_genes(adata.var_names, tokenizer.gene_panel, load_gene_table(CELLS / "tables" / table))
    before, after = tokenizer.align(adata), tokenizer.align(adata, gene_names=mapping.names)
    assert after.n_matched == before.n_matched + mapping.counts["renamed"] > before.n_matched
    assert after.n_absent == mapping.counts["absent"]
