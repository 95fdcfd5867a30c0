"""Annotating that is stopped or runs out of disk: no output under its name, and the same command works again."""

import errno
import io
import signal
import subprocess
import sys
import time

import anndata
import numpy as np
import pytest

from scbert.commands.cli import main
from scbert.data import write_h5ad
from scbert.inference import annotate

COMMAND = "import sys; from scbert.commands.cli import main; sys.exit(main())"
# slow enough to be caught in the act: every batch waits
SLOW = (
    "import time; from scbert.trained_model import prediction; run = prediction._forward; "
    "prediction._forward = lambda *a: (time.sleep(0.2), run(*a))[1]; "
)
# the copy lies beside the output, and is killed before its columns are complete
KILLED_WRITING = (
    "import os, signal; from scbert.data import write_h5ad; add = write_h5ad._add_elements; "
    "write_h5ad._add_elements = lambda file, *a: (add(file, *a), file.flush(), os.kill(os.getpid(), signal.SIGKILL)); "
)


def start(prelude, query, model, output, *options):
    arguments = ["annotate", query, "--model", model, "--output", output, "--batch-size", "2", *options]
    return subprocess.Popen(
        [sys.executable, "-c", prelude + COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_sigterm_and_sigkill_in_the_middle(query, model_dir, tmp_path):
    output, before = tmp_path / "out.h5ad", visible(tmp_path)
    running = {sign: start(SLOW, query, model_dir, output) for sign in (signal.SIGTERM, signal.SIGKILL)}
    for sign, process in running.items():
        for line in process.stderr:
            if "genes found" in line:
                break
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(sign)
    terminated, killed = running.values()
    _, err = terminated.communicate(timeout=60)
    assert terminated.returncode == 143
    assert "Stopped by SIGTERM" in err and "Traceback" not in err
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    # not even a hidden file: nothing is written before everything is computed
    assert {path.name for path in tmp_path.iterdir()} == before

    assert main(["annotate", str(query), "--model", str(model_dir), "--output", str(output)]) == 0
    found = anndata.read_h5ad(output).obsm["scbert_probabilities"]
    expected = annotate(anndata.read_h5ad(query), model_dir, progress=False).obsm["scbert_probabilities"]
    np.testing.assert_array_equal(found, expected)


def test_killed_while_writing_leaves_an_older_output_as_it_was(query, model_dir, tmp_path):
    output = tmp_path / "out.h5ad"
    output.write_bytes(b"precious")
    before = visible(tmp_path)
    process = start(KILLED_WRITING, query, model_dir, output, "--overwrite")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert output.read_bytes() == b"precious"
    assert visible(tmp_path) == before
    arguments = ["annotate", query, "--model", model_dir, "--output", output, "--overwrite"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "scbert_cell_type" in anndata.read_h5ad(output).obs
    assert not list(tmp_path.glob(".out.h5ad*")), "the killed run's temporary file is gone"


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 0

    def write(self, data):
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


class FileOnFullDisk(write_h5ad.DeferredWriteErrorFile, FullDisk):
    pass


@pytest.mark.parametrize("room", [-1, 0, 100, 1000, 2000, 5000, 10_000])
def test_full_disk(query, model_dir, tmp_path, monkeypatch, capsys, room):
    """The disk fills while the file is copied, or at one or the other place while the columns are added."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if room < 0:
        monkeypatch.setattr(write_h5ad.shutil, "copyfile", full)
    else:
        monkeypatch.setattr(FullDisk, "room", room)
        monkeypatch.setattr(write_h5ad, "DeferredWriteErrorFile", FileOnFullDisk)
    before = {path.name for path in tmp_path.iterdir()}
    output = tmp_path / "out.h5ad"
    assert main(["annotate", str(query), "--model", str(model_dir), "--output", str(output)]) == 1
    err = capsys.readouterr().err
    assert "disk is full" in err and "Traceback" not in err and "HDF5" not in err
    assert {path.name for path in tmp_path.iterdir()} == before
