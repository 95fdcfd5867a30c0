import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scbert.data.read import matrix_rows
from scbert.data.read_backed import BackedCells, open_cells
from scbert.tokenization import InputError


@pytest.fixture
def path(adata, tmp_path):
    adata.layers["csc"] = sp.csc_matrix(adata.X)
    adata.layers["dense"] = adata.X.toarray()
    adata.raw = adata[:, :200].copy()
    adata.obsm["X_pca"] = np.ones((120, 3))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize("layer", [None, "csc", "dense", "raw"])
def test_rows_of_every_matrix(path, adata, layer):
    cells = open_cells(path, layer)
    assert isinstance(cells, BackedCells) and cells.isbacked
    matrix, names = matrix_rows(cells, layer)
    rows = matrix[10:20]
    found = rows.toarray() if sp.issparse(rows) else rows
    np.testing.assert_array_equal(found, adata.X[10:20, : len(names)].toarray())
    assert list(names) == list(adata.var_names[: len(names)])
    cells.file.close()


def test_looks_like_the_anndata(path, adata):
    cells = open_cells(path)
    assert cells.n_obs == 120 and cells.n_vars == 300
    assert list(cells.obs) == list(adata.obs) and cells.var.equals(adata.var)
    for name in adata.obs:
        assert cells.obs[name].equals(adata.obs[name].reset_index(drop=True))
    with pytest.raises(KeyError):
        cells.obs["_index"]
    assert set(cells.layers) == {"csc", "dense"} and "X_pca" in cells.obsm
    np.testing.assert_array_equal(np.asarray(cells.obsm["X_pca"]), 1)
    cells.file.close()


def test_other_formats_are_read_into_memory(adata, tmp_path):
    adata.write_zarr(tmp_path / "cells.zarr")
    assert isinstance(open_cells(tmp_path / "cells.zarr"), anndata.AnnData)


def test_what_is_wrong_is_said_as_by_read_cells(path, tmp_path, adata):
    with pytest.raises(InputError, match="no layer 'absent'; it has|There is no layer 'absent'"):
        open_cells(path, "absent")
    (tmp_path / "cut.h5ad").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read"):
        open_cells(tmp_path / "cut.h5ad")
    adata[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(InputError, match="0 cells"):
        open_cells(tmp_path / "none.h5ad")
