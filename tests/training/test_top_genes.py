"""A panel of the most variable genes."""

import numpy as np

from scbert.training.finetune_data import most_variable_genes
from scbert.training.run_finetune import finetune


def test_the_most_variable_genes_in_the_order_of_the_columns(adata):
    chosen = most_variable_genes(adata, 40, None, "auto")
    assert chosen == [gene for gene in adata.var_names if gene in set(chosen)] and len(chosen) == 40
    # the markers of the three types vary the most
    assert len(set(chosen) & set(adata.var_names[:45])) > 30
    assert most_variable_genes(adata, 10_000, None, "auto") == list(adata.var_names)


def test_the_panel_ignores_the_test_cells(adata, tiny_recipe, tmp_path):
    test = np.arange(120) >= 80
    values = adata.X.tolil()
    # a gene that varies among test cells only, and there the most
    values[:, 60] = 0
    values[np.flatnonzero(test)[::2], 60] = 500
    adata.X = values.tocsr()
    adata.obs["split"] = np.where(test, "test", "train")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = {"recipe": tiny_recipe, "test_key": "split", "top_genes": 50, "num_train_epochs": 1}
    summary = finetune(tmp_path / "cells.h5ad", "cell_type", tmp_path / "model", **options)
    panel = (tmp_path / "model" / "gene_panel.txt").read_text().split()
    assert summary["data"]["genes"]["panel"] == len(panel) == 50
    assert adata.var_names[60] not in panel
