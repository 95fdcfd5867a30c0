import errno
import os
import subprocess
import sys

import anndata
import numpy as np
import pytest

from scbert.data import atomic_copy_h5ad, atomic_path, atomic_write_h5ad, check_output_path, partial_folder
from scbert.data import output as output_module
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


@pytest.mark.parametrize("kind", ["same", "relative", "link", "hard link"])
def test_output_equal_to_input_is_refused_always(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.h5ad"
    source.write_text("x")
    output = {"same": source, "relative": "in.h5ad", "link": tmp_path / "l", "hard link": tmp_path / "h"}[
        kind
    ]
    if kind == "link":
        output.symlink_to(source)
    if kind == "hard link":
        os.link(source, output)
    with pytest.raises(InputError, match="input itself"):
        check_output_path(output, overwrite=True, inputs=(source,))


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        check_output_path(tmp_path / "none" / "out.h5ad")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="is a folder"), atomic_path(folder, overwrite=True):
        pass
    folder.chmod(0o500)
    if not os.access(folder, os.W_OK):
        with pytest.raises(InputError, match="not writable"):
            check_output_path(folder / "out.h5ad")
    folder.chmod(0o700)


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    with atomic_path(tmp_path / "link.csv", overwrite=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.csv", overwrite=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert entries(tmp_path) == ["a.csv"] and (tmp_path / "a.csv").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_message(tmp_path, adata, monkeypatch, code):
    class Full:
        written = 0

        def __init__(self, raw):
            self.raw = raw

        def __getattr__(self, name):
            return getattr(self.raw, name)

        def write(self, data):
            Full.written += len(data)
            if Full.written > 30_000:
                raise OSError(code, os.strerror(code))
            return self.raw.write(data)

    patient = output_module.PatientFile
    monkeypatch.setattr(output_module, "PatientFile", lambda raw: patient(Full(raw)))
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
from scbert.data import atomic_copy_h5ad, atomic_write_h5ad
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
    assert done.stdout.count("Nothing was left half-written.|") == 6
    assert entries(tmp_path) == ["in.h5ad"]


# folders


def build(path, text="1", **options):
    with partial_folder(path, **options) as folder:
        assert folder.name == path.name + ".partial"
        (folder / "config.json").write_text(text)


def test_folder_appears_when_complete(tmp_path):
    build(tmp_path / "model")
    assert entries(tmp_path) == ["model"]
    with pytest.raises(InputError, match="--overwrite"):
        build(tmp_path / "model")
    build(tmp_path / "model", "2", overwrite=True)
    assert (tmp_path / "model" / "config.json").read_text() == "2" and entries(tmp_path) == ["model"]


def test_interrupted_folder_is_resumed_or_begun_anew(tmp_path, caplog):
    for resume, kept in ((True, True), (False, False)):
        with pytest.raises(KeyboardInterrupt), partial_folder(tmp_path / "model", overwrite=True) as folder:
            (folder / "checkpoint").write_text("x")
            raise KeyboardInterrupt
        assert "model.partial" in entries(tmp_path)
        with partial_folder(tmp_path / "model", resume=resume, overwrite=True) as folder:
            assert (folder / "checkpoint").exists() == kept
            (folder / "config.json").write_text("1")
        assert entries(tmp_path) == ["model"]
    assert "--resume" in caplog.text


def test_folders_of_others_are_never_removed(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for path in (home, home / "thesis.tex"):
        with pytest.raises(InputError):
            build(path, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(home)
    with pytest.raises(InputError):
        build(link, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"
    (home / "thesis.tex").unlink()
    build(home, overwrite=True)


def test_full_disk_in_a_folder(tmp_path):
    with pytest.raises(OSError, match="disk is full"), partial_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "model").exists()
