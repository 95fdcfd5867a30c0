"""The check for CUDA machines, on a machine that is none: every part runs, is printed, and is judged."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_check

SCRIPT = Path(gpu_check.__file__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole check")
def test_without_a_gpu_it_says_so():
    result = subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("No CUDA device.")


@pytest.fixture
def on_cpu(monkeypatch):
    """A CPU in place of the GPU, the portable engine in place of the kernels."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "favor_backend", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(gpu_check, "CASES", [(1, 2, 9, 11, 8, 4, 20, True, 4)])
    monkeypatch.setattr(gpu_check, "WAYS", dict(gpu_check.WAYS) | {"ours": ("favor", contextlib.nullcontext)})
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 30)
    chip = SimpleNamespace(name="no GPU", multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)


def test_every_part_runs_and_is_written(on_cpu, tmp_path, monkeypatch, capsys):
    output = tmp_path / "found" / "gpu_check.json"
    command = "gpu_check.py --batches 1 --length 30 --layers 1 --repeats 1 --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(output)])
    # the block is not the kernels' here
    assert gpu_check.main() == 1
    found = json.loads(output.read_text())["found"]
    assert [x["kind"] for x in found] == ["attention"] * 2 + ["block"] * 2 + ["losses"] + ["speed"] * 11
    failed = [x for x in found if "failed" in x]
    # there are no graphs on a CPU; kernels were asked for by name
    assert {x["of"].split(",")[1].strip() for x in failed} <= {"30", "kernels of attention alone"}, failed
    assert [gpu_check.is_bad(x) for x in found[:5]] == [False, False, True, True, False]
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "FAILED" in printed and "cells/s, 0.00 GiB" in printed


@pytest.mark.parametrize(
    "errors, bad", [([0.01, 0.01], False), ([0.01, 0.03], True), ([0.01, float("nan")], True)]
)
def test_errors_beyond_the_bound_and_what_is_no_number_are_bad(errors, bad):
    found = {"kind": "attention", "of": "", "bound": 0.02, "errors": dict(zip("ab", errors))}
    assert gpu_check.is_bad(found) is bad
    assert ("WRONG" in gpu_check.show(found)) is bad


def test_a_part_that_fails_is_a_finding():
    def fails(x):
        raise RuntimeError("too big")

    found = gpu_check.part("block", fails, 3)()
    assert gpu_check.is_bad(found)
    assert gpu_check.show(found) == "block (3): FAILED: RuntimeError: too big"
