"""`scbert build` as a process: killed in the middle and taken up again, and what its exit code says."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from datasets import load_from_disk

from scbert.commands.cli import main

N_FILES, SHARD_CELLS = 4, 3
COMMAND = [sys.executable, "-m", "scbert", "build"]


@pytest.fixture
def files(adata, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(120), N_FILES)):
        adata[rows].write_h5ad(folder / f"{number}.h5ad")
    return folder


def options(output):
    return ["--output", output, "--num-proc", 2, "--shard-cells", SHARD_CELLS, "--min-genes", 0]


def content(corpus):
    """Bytes of every file; a corpus holds nothing that tells when it was built."""
    return {path.name: path.read_bytes() for path in corpus.iterdir()}


@pytest.mark.slow
def test_killed_build_goes_on_to_the_same_corpus(files, tmp_path):
    whole, corpus = tmp_path / "whole", tmp_path / "corpus"
    subprocess.run([*map(str, [*COMMAND, files, *options(whole)])], check=True, capture_output=True)

    process = subprocess.Popen([*map(str, [*COMMAND, files, *options(corpus)])], stderr=subprocess.DEVNULL)
    partial = tmp_path / "corpus.partial"
    deadline = time.monotonic() + 240
    while len(list(partial.glob("cells-*.json"))) < 6:
        assert process.poll() is None and time.monotonic() < deadline, "nothing was written"
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert len(workers) >= 2
    # those that worked for it do not go on by themselves
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    finished = {
        path.with_suffix(".arrow").name: path.with_suffix(".arrow").stat().st_mtime_ns
        for path in partial.glob("cells-*.json")
    }
    assert 6 <= len(finished) < 120 / SHARD_CELLS and not corpus.exists()

    subprocess.run(
        [*map(str, [*COMMAND, files, *options(corpus), "--resume"])], check=True, capture_output=True
    )
    assert {name: (corpus / name).stat().st_mtime_ns for name in finished} == finished
    assert content(corpus) == content(whole) and not partial.exists()
    assert len(load_from_disk(str(corpus))) == 120
    assert main(["build", str(corpus), "--verify"]) == 0


def test_exit_code_tells_of_skipped_files_only_if_strict(files, tmp_path, capsys):
    (files / "damaged.h5ad").write_bytes(b"nothing")
    build = ["build", str(files), "--min-genes", "0", "--json", "--output"]
    assert main([*build, str(tmp_path / "corpus")]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["files_skipped"] == 1 and summary["skipped_files"] == [str(files / "damaged.h5ad")]
    assert "damaged.h5ad is left out" in captured.err
    assert main([*build, str(tmp_path / "strict"), "--strict"]) == 1
    assert "damaged.h5ad" in capsys.readouterr().err and not (tmp_path / "strict").exists()
