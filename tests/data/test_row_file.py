import errno
import os

import anndata
import numpy as np
import pytest

from scbert.data import atomic_copy_h5ad, row_file
from scbert.data.row_file import RowFile


def test_rows_are_what_was_set(tmp_path):
    rows = RowFile((7, 3), tmp_path / "out.h5ad")
    expected = np.zeros((7, 3), dtype=np.float32)
    values = np.random.default_rng(0).random((4, 3))
    rows[2:6], expected[2:6] = values, values
    rows[6:9], expected[6:9] = np.ones((1, 3)), 1
    assert len(rows) == 7 and rows.shape == (7, 3) and not list(tmp_path.iterdir())
    np.testing.assert_array_equal(rows[:], expected)
    np.testing.assert_array_equal(rows[3:5], expected[3:5])
    np.testing.assert_array_equal(rows[np.array([6, 0, 3])], expected[[6, 0, 3]])
    assert rows[7:].shape == rows[np.array([], dtype=int)].shape == (0, 3)
    with pytest.raises(ValueError, match="broadcast"):
        rows[:2] = np.ones((3, 3))


@pytest.mark.parametrize("version", ["0.2.0", "0.1.0"])
def test_copied_block_by_block_into_a_file_of_any_age(tmp_path, adata, monkeypatch, version):
    monkeypatch.setattr(row_file, "BLOCK", 50)
    adata.obsm["p"] = np.ones((120, 9))
    adata.write_h5ad(tmp_path / "in.h5ad")
    if version == "0.1.0":
        # any version but the one known is read and written anew
        monkeypatch.setattr("scbert.data.output.TABLE_VERSION", "other")
    rows = RowFile((120, 3), tmp_path / "out.h5ad")
    rows[:] = values = np.random.default_rng(0).random((120, 3), dtype=np.float32)
    columns = {"new": np.arange(120.0), "cell_type": np.array(["x", "y"] * 60, dtype=object)}
    atomic_copy_h5ad(tmp_path / "in.h5ad", tmp_path / "out.h5ad", obs=columns, obsm={"p": rows})
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(read.obsm["p"], values)
    assert list(read.obs) == [*adata.obs, "new"] and list(read.obs_names) == list(adata.obs_names)
    assert list(read.obs["cell_type"][:2]) == ["x", "y"]
    np.testing.assert_array_equal(read.obs["new"], columns["new"])


def test_full_disk_names_the_output(tmp_path):
    class Full:
        def seek(self, place):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows = RowFile((2, 2), tmp_path / "out.h5ad")
    rows._file = Full()
    with pytest.raises(OSError, match="out.h5ad: the disk is full"):
        rows[:] = np.ones((2, 2))
