import resource
import subprocess
import sys

import anndata
import numpy as np
import pytest

from scbert.data import read
from scbert.data.disk_matrix import DiskMatrix
from scbert.data.write_h5ad import atomic_copy_h5ad


def test_rows_are_what_was_set(tmp_path):
    rows = DiskMatrix((7, 3), tmp_path / "out.h5ad")
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
    monkeypatch.setattr(read, "ROW_BLOCK", 50)
    adata.obsm["p"] = np.ones((120, 9))
    adata.write_h5ad(tmp_path / "in.h5ad")
    if version == "0.1.0":
        # any version but the one known is read and written anew
        monkeypatch.setattr("scbert.data.write_h5ad.TABLE_VERSION", "other")
    rows = DiskMatrix((120, 3), tmp_path / "out.h5ad")
    rows[:] = values = np.random.default_rng(0).random((120, 3), dtype=np.float32)
    columns = {"new": np.arange(120.0), "cell_type": np.array(["x", "y"] * 60, dtype=object)}
    atomic_copy_h5ad(tmp_path / "in.h5ad", tmp_path / "out.h5ad", obs=columns, obsm={"p": rows})
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(found.obsm["p"], values)
    assert list(found.obs) == [*adata.obs, "new"] and list(found.obs_names) == list(adata.obs_names)
    assert list(found.obs["cell_type"][:2]) == ["x", "y"]
    np.testing.assert_array_equal(found.obs["new"], columns["new"])


def test_memory_does_not_grow_with_the_rows(tmp_path):
    # 128 MB on disk, a tenth of that in memory
    rows = DiskMatrix((1 << 20, 32), tmp_path / "out.h5ad")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for block in read.row_blocks(len(rows)):
        rows[block] = rows[block] + 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert rows[-5:].sum() == 5 * 32
    assert grown * (1 if sys.platform == "darwin" else 1024) < 12_800_000


@pytest.mark.skipif(sys.platform != "linux", reason="room is reserved on Linux")
def test_full_disk_names_the_output_at_once(tmp_path):
    script = """
import resource
from scbert.data.disk_matrix import DiskMatrix
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    DiskMatrix((1_000, 10), "out.h5ad")
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Could not write out.h5ad: the file grew" in done.stdout
    assert not list(tmp_path.iterdir())
