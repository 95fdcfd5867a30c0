"""Paths of cells and outputs: what is refused, and what is left where writing fails."""

import errno
import json
import multiprocessing
import os
import time

import pytest

from scbert.data import paths
from scbert.data.paths import (
    MARK,
    atomic_path,
    check_cells_path,
    check_output_path,
    keep_record,
    partial_folder,
    stamp_of,
)
from scbert.tokenization import InputError


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


def test_outputs_have_the_suffix_of_their_format(tmp_path):
    assert check_output_path(tmp_path / "out.H5AD", suffix=".h5ad")
    with pytest.raises(InputError, match=r"out.csv must be named .h5ad"):
        check_output_path(tmp_path / "out.csv", suffix=".h5ad")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cells.csv", "Convert it to .h5ad"),
        ("cells.loom", ".loom files are not read"),
        ("cells.csv.gz", ".gz files are not read"),
        ("cells.h5ad.gz", "Unpack it first: gunzip"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, name, words):
    (tmp_path / name).write_text("something")
    with pytest.raises(InputError, match=words):
        check_cells_path(tmp_path / name)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        check_cells_path(tmp_path / "cells.h5ad")
    (tmp_path / "cells.h5ad").touch()
    with pytest.raises(InputError, match="is empty"):
        check_cells_path(tmp_path / "cells.h5ad")


def test_a_change_deep_in_a_folder_is_noticed(tmp_path):
    chunk = tmp_path / "cells.zarr" / "X" / "data" / "0"
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"1")
    before = stamp_of(tmp_path / "cells.zarr")
    os.utime(chunk, (1, 1))
    assert stamp_of(tmp_path / "cells.zarr") != before
    assert stamp_of(tmp_path / "none.h5ad") == []


def test_folders_above_the_cells_name_what_is_below(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without a 10x matrix.mtx"):
        check_cells_path(tmp_path)
    matrix = tmp_path / "outs" / "filtered_feature_bc_matrix"
    matrix.mkdir(parents=True)
    (matrix / "matrix.mtx.gz").touch()
    assert check_cells_path(matrix) == matrix
    for above in (tmp_path, tmp_path / "outs"):
        with pytest.raises(InputError, match=f"is a folder above the cells.*: {matrix}[.]$"):
            check_cells_path(above)
    for i in range(5):
        (tmp_path / f"{i}.h5ad").touch()
    with pytest.raises(InputError, match=r"0.h5ad, .*3.h5ad and 2 more"):
        check_cells_path(tmp_path)


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


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
        with (
            pytest.raises(KeyboardInterrupt),
            partial_folder(tmp_path / "model", overwrite=True, resume=False) as folder,
        ):
            (folder / "checkpoint").write_text("x")
            raise KeyboardInterrupt
        assert "model.partial" in entries(tmp_path)
        with partial_folder(tmp_path / "model", resume=resume, overwrite=True) as folder:
            assert (folder / "checkpoint").exists() == kept
            (folder / "config.json").write_text("1")
        assert entries(tmp_path) == ["model"]
    assert "--resume" in caplog.text


def test_a_folder_that_is_being_built_is_left_to_its_process(tmp_path):
    with partial_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("1")
        for resume in (None, False, True):
            with pytest.raises(InputError, match="Another process is writing this output"):
                build(tmp_path / "model", resume=resume)
    assert entries(tmp_path / "model") == ["config.json"]


def test_a_finished_folder_is_nobody_elses_before_it_has_its_name(tmp_path, monkeypatch):
    swap = paths._swap

    def beside_another(*arguments):
        with pytest.raises(InputError, match="Another process"):
            build(tmp_path / "model", "2")
        swap(*arguments)

    monkeypatch.setattr(paths, "_swap", beside_another)
    build(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "1"


def test_a_run_that_ended_keeps_nobody_out(tmp_path):
    """Not even where its error is looked at, or a process that it forked still runs."""
    with pytest.raises(KeyboardInterrupt) as kept, partial_folder(tmp_path / "model", resume=False) as folder:
        forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        forked.start()
        (folder / "checkpoint").write_text("x")
        raise KeyboardInterrupt
    with partial_folder(tmp_path / "model", resume=True) as folder:
        assert (folder / "checkpoint").exists() and kept
    forked.kill()


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
    home.rename(tmp_path / "model.partial")
    for resume in (False, True):
        with pytest.raises(InputError, match="model.partial .* Move it"):
            build(tmp_path / "model", resume=resume)
    (tmp_path / "model.partial").rename(home)
    (home / "thesis.tex").unlink()
    build(home, overwrite=True)
    home.rename(tmp_path / "model.partial")
    (tmp_path / "model.partial" / "config.json").unlink()
    build(tmp_path / "model")
    assert entries(tmp_path / "model") == ["config.json"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_record_is_whole_and_holds(tmp_path, monkeypatch):
    record = tmp_path / "run.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted)
        keep_record(record, {"seed": 1})
    assert entries(tmp_path) == []
    for _ in range(2):
        keep_record(record, {"seed": 1})
    with pytest.raises(InputError, match=r"other settings or files \(seed\)"):
        keep_record(record, {"seed": 2})
    assert json.loads(record.read_text()) == {"seed": 1}


def test_a_folder_that_cannot_be_resumed_leaves_nothing(tmp_path, caplog):
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
        with (
            pytest.raises(type(error)) as caught,
            partial_folder(tmp_path / "model") as folder,
        ):
            (folder / "config.json").write_text("1")
            raise error
        assert entries(tmp_path) == [] and "resume" not in str(caught.value)
    killed = tmp_path / "model.partial"
    killed.mkdir()
    for name in (MARK, "weights"):
        (killed / name).touch()
    build(tmp_path / "model", resume=None)
    assert "an interrupted run left" in caplog.text and "resume" not in caplog.text


def test_full_disk_in_a_folder(tmp_path):
    with pytest.raises(OSError, match="disk is full"), partial_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "model").exists()
