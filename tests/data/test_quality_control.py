import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scbert.data import quality_control
from scbert.data.quality_control import QualityRules, choose_cells, measure_cells
from scbert.data.read import read_cells
from scbert.tokenization import InputError


def chosen(cells, *rules, **more):
    return choose_cells(cells.obs, measure_cells(cells), QualityRules(*rules, **more))


def test_measures_equal_dense_reference(tmp_path, adata, monkeypatch):
    monkeypatch.setattr(quality_control, "CHUNK_SIZE", 50)
    dense = adata.X.toarray()
    mito = adata.var_names.str.startswith("MT-")
    adata.write_h5ad(tmp_path / "a.h5ad")
    for cells in (adata, read_cells(tmp_path / "a.h5ad", backed=True)):
        quality = measure_cells(cells)
        np.testing.assert_array_equal(quality.n_genes, (dense > 0).sum(1))
        np.testing.assert_allclose(quality.mito_fraction, dense[:, mito].sum(1) / dense.sum(1))
        np.testing.assert_array_equal(quality.cells_per_gene, (dense > 0).sum(0))
    adata.X = adata.X.log1p()
    share_of_counts = measure_cells(adata, log1p=True).mito_fraction
    np.testing.assert_allclose(share_of_counts, quality.mito_fraction, rtol=1e-5)


def test_rules_and_report(adata):
    dense = adata.X.toarray()
    dense[0] = 0
    dense[1, adata.var_names.str.startswith("MT-")] = 10_000
    adata.X = sp.csr_matrix(dense)
    adata.obs["doublet_score"] = np.r_[np.zeros(118), 0.9, np.nan]
    keep, report = chosen(adata, 1, max_mito_fraction=0.5, doublet_key="doublet_score")
    assert report == {"few_genes": 1, "mitochondrial": 1, "doublets": 1, "kept": 117}
    assert np.flatnonzero(~keep).tolist() == [0, 1, 118]
    assert chosen(adata, 0)[1]["kept"] == 120


@pytest.mark.parametrize(
    "values",
    [
        [True, False], ["doublet", "singlet"], [1, 0],
        pd.array([True, None], dtype="boolean"), pd.array([1, None], dtype="Int64"),
        pd.array([0.9, None], dtype="Float64"),
    ],
)  # fmt: skip
def test_doublet_calls(adata, values):
    adata.obs["call"] = pd.Series(values).repeat(60).array
    assert chosen(adata, 0, doublet_key="call")[1]["doublets"] == 60


def test_rules_that_cannot_be_applied(adata):
    with pytest.raises(InputError, match="no column 'score'"):
        chosen(adata, doublet_key="score")
    with pytest.raises(InputError, match="neither a score"):
        chosen(adata, doublet_key="cell_type")
    with pytest.raises(InputError, match="between 0 and 1"):
        chosen(adata, max_mito_fraction=5)
    no_mito = adata[:, ~adata.var_names.str.startswith("MT-")]
    with pytest.raises(InputError, match="no mitochondrial genes"):
        chosen(no_mito, max_mito_fraction=0.1)
