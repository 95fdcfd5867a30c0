"""Cells that are scored have taught nothing; where they may have, it is told."""

import anndata
import numpy as np
import pytest

from scbert.training.run_finetune import finetune

QUIET = {"use_cpu": True, "disable_tqdm": True}


def test_a_gene_of_test_cells_alone_changes_nothing(adata, tmp_path):
    test = np.arange(120) >= 80
    adata.X[:, [60]] = np.where(test & (np.arange(120) % 2 == 0), 500, 0)[:, None]
    adata.obs["split"] = np.where(test, "test", "train")
    with_it, without = (
        finetune(cells, "cell_type", tmp_path / name, test_key="split", **QUIET)
        for name, cells in (("with", adata), ("without", adata[:, np.arange(300) != 60].copy()))
    )
    assert with_it["data"]["genes"]["panel"] == without["data"]["genes"]["panel"] == 299
    # on the panel it would change the size factors of the test cells
    assert with_it["test"] == without["test"]


@pytest.mark.parametrize("share", [0, 0.2])
def test_copies_in_the_reference_are_told(share, adata, tmp_path, caplog):
    twice = anndata.concat([adata, adata[:30]], index_unique="-")
    summary = finetune(twice, "cell_type", tmp_path / "model", test_fraction=share, **QUIET)
    (note,) = summary["notes"]
    assert note.startswith("30 of 150 cells are copies of others") and note in caplog.text
