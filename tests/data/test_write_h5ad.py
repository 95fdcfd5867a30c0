import errno
import io
import os
import subprocess
import sys

import anndata
import numpy as np
import pytest

from scbert.data import write_h5ad
from scbert.data.write_h5ad import DeferredWriteErrorFile, atomic_copy_h5ad, atomic_write_h5ad
from scbert.tokenization import InputError


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_h5ad_round_trip(tmp_path, adata):
    adata.raw = adata
    adata.layers["half"] = adata.X * 0.5
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(120, 5))
    adata.obs["text"] = ["with space", "a/b", None, "ünï"] * 30
    adata.uns["scbert"] = {"labels": ["CD8+/CD45RA+", "B"], "threshold": 0.5}
    before = adata.copy()
    atomic_write_h5ad(adata, tmp_path / "out.h5ad")
    assert entries(tmp_path) == ["out.h5ad"]
    assert list(adata.obs["text"][:4]) == list(before.obs["text"][:4])
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (read.X != before.X).nnz == 0 and (read.raw.X != before.X).nnz == 0
    assert (read.layers["half"] != before.layers["half"]).nnz == 0
    assert list(read.uns["scbert"]["labels"]) == ["CD8+/CD45RA+", "B"]
    assert list(read.obs["text"][:2]) == ["with space", "a/b"] and read.obs["text"].isna().sum() == 30
    np.testing.assert_array_equal(read.obsm["X_pca"], adata.obsm["X_pca"])


def test_copy_with_additions_leaves_the_rest_to_the_byte(tmp_path, adata):
    adata.obs["scbert_cell_type"] = "old"
    adata.write_h5ad(tmp_path / "in.h5ad")
    before = (tmp_path / "in.h5ad").read_bytes()
    probabilities = np.random.default_rng(0).random((120, 3), dtype=np.float32)
    atomic_copy_h5ad(
        tmp_path / "in.h5ad", tmp_path / "out.h5ad",
        obs={"scbert_cell_type": np.array(["B/T"] * 120, dtype=object), "scbert_confidence": np.ones(120)},
        obsm={"scbert_probabilities": probabilities}, uns={"scbert": {"threshold": 0.5}},
    )  # fmt: skip
    assert (tmp_path / "in.h5ad").read_bytes() == before
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(read.obs) == [*adata.obs, "scbert_confidence"]
    assert set(read.obs["scbert_cell_type"]) == {"B/T"}
    assert (read.X != adata.X).nnz == 0 and read.uns["scbert"]["threshold"] == 0.5
    np.testing.assert_array_equal(read.obsm["scbert_probabilities"], probabilities)


def test_backed_cells_can_be_written_elsewhere_only(tmp_path, adata):
    adata.write_h5ad(tmp_path / "in.h5ad")
    backed = anndata.read_h5ad(tmp_path / "in.h5ad", backed="r")
    with pytest.raises(InputError, match="input itself"):
        atomic_write_h5ad(backed, tmp_path / "in.h5ad", overwrite=True)
    atomic_write_h5ad(backed, tmp_path / "out.h5ad")
    assert (anndata.read_h5ad(tmp_path / "out.h5ad").X != adata.X).nnz == 0


def test_existing_outputs_need_consent(tmp_path, adata):
    path = tmp_path / "out.h5ad"
    path.write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        atomic_write_h5ad(adata, path)
    assert path.read_text() == "precious"
    atomic_write_h5ad(adata, path, overwrite=True)
    assert anndata.read_h5ad(path).n_obs == 120


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_message(tmp_path, adata, monkeypatch, code):
    class FullDisk(io.FileIO):
        written = 0

        def write(self, data):
            FullDisk.written += len(data)
            if FullDisk.written > 30_000:
                raise OSError(code, os.strerror(code))
            return super().write(data)

    class FileOnFullDisk(DeferredWriteErrorFile, FullDisk):
        pass

    monkeypatch.setattr(write_h5ad, "DeferredWriteErrorFile", FileOnFullDisk)
    with pytest.raises(OSError, match="Could not write") as error:
        atomic_write_h5ad(adata, tmp_path / "out.h5ad")
    assert error.value.errno == code and "free some space" in str(error.value)
    assert entries(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
def test_a_real_failed_write_ends_quietly(tmp_path, adata):
    adata.write_h5ad(tmp_path / "in.h5ad")
    script = """
import resource, sys
import anndata
from scbert.data.write_h5ad import atomic_copy_h5ad, atomic_write_h5ad
adata = anndata.read_h5ad("in.h5ad")
for limit in (500, 5_000, 40_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for write in (lambda: atomic_write_h5ad(adata, "out.h5ad"),
                  lambda: atomic_copy_h5ad("in.h5ad", "out.h5ad", obs={"a": list(range(120))})):
        try:
            write()
        except OSError as error:
            sys.stdout.write(str(error)[-40:] + "|")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("No incomplete output was left.|") == 6
    assert entries(tmp_path) == ["in.h5ad"]
