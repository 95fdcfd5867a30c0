"""How compiled blocks are built and kept: failing compilers, folders of others, broken files."""

import os
import stat

import pytest
import torch

from scbert import ScBertConfig
from scbert.modeling_scbert import compiled_layer_scbert as compiled
from scbert.modeling_scbert import cpu_speed_scbert
from scbert.modeling_scbert.compiled_layer_scbert import compiled_serves, use_compiled_layers
from scbert.modeling_scbert.layers_scbert import ScBertLayer

pytestmark = pytest.mark.usefixtures("compiled_blocks")


def fresh(monkeypatch, tmp_path, **environment):
    """As if nothing had been built or loaded yet."""
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, f"-DFRESH={tmp_path.name}"))
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path / "cache"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_failing_compiler_is_reported_and_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "no such luck" >&2\nexit 1\n')
    compiler.chmod(0o700)
    fresh(monkeypatch, tmp_path, CXX=str(compiler))
    report = use_compiled_layers()
    assert not report.enabled and "no such luck" in str(report)
    assert not compiled_serves(ScBertLayer(ScBertConfig(), 0), torch.randn(1, 9, 200))
    assert not list((tmp_path / "cache" / "compiled").iterdir())
    monkeypatch.undo()
    assert use_compiled_layers().enabled


def test_no_compiler_is_reported(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path, CXX=str(tmp_path / "none"))
    report = use_compiled_layers()
    assert not report.enabled and "none was not found" in report.reason and "CXX" in report.reason
    monkeypatch.undo()
    assert use_compiled_layers().enabled


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_folder_that_others_can_write_is_refused(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path)
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    report = use_compiled_layers()
    assert not report.enabled and "SCBERT_CACHE" in report.reason
    assert folder.stat().st_mode & stat.S_IWOTH
    monkeypatch.undo()
    assert use_compiled_layers().enabled


def test_a_broken_file_is_built_anew(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path)
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True, mode=0o700)
    library = folder / f"scbert_compiled_{compiled._fingerprint()}.so"
    library.write_bytes(b"cut short")
    report = use_compiled_layers()
    assert report.enabled and report.error < compiled.MAX_ERROR
    assert library.stat().st_size > 10_000 and list(folder.iterdir()) == [library]


def test_blocks_that_disagree_are_not_kept(monkeypatch):
    monkeypatch.setattr(compiled, "MAX_ERROR", 0.0)
    report = use_compiled_layers()
    assert not report.enabled and "relative error" in str(report)
    monkeypatch.undo()
    assert use_compiled_layers().enabled


def test_the_environment_asks_once(monkeypatch):
    used = []
    monkeypatch.setattr(cpu_speed_scbert, "SWITCHES", {"SCBERT_COMPILED": lambda: used.append("compiled")})
    for value in ("0", "1"):
        monkeypatch.setenv("SCBERT_COMPILED", value)
        cpu_speed_scbert.apply_requested_cpu_speed.cache_clear()
        for _ in range(2):
            cpu_speed_scbert.apply_requested_cpu_speed()
    assert used == ["compiled"]
    cpu_speed_scbert.apply_requested_cpu_speed.cache_clear()
    monkeypatch.delenv("SCBERT_COMPILED")
    cpu_speed_scbert.request_cpu_speed(compiled=True)
    assert used == ["compiled"] * 2 and os.environ["SCBERT_COMPILED"] == "1"
    cpu_speed_scbert.apply_requested_cpu_speed.cache_clear()
    monkeypatch.delenv("SCBERT_COMPILED")
