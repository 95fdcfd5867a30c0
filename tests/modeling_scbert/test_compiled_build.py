"""When blocks are compiled, how they are built and kept: failing compilers, folders of others, broken files."""

import os
import stat
import subprocess
import sys

import pytest
import torch

from scbert import ScBertConfig
from scbert.modeling_scbert import compiled_layer_scbert
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.blocks_scbert import choose_block
from scbert.modeling_scbert.compiled_layer_scbert import MAX_ERROR, compiled_blocks
from scbert.modeling_scbert.layers_scbert import ScBertLayer

pytestmark = pytest.mark.usefixtures("compiled")


def build():
    return compiled_blocks.__wrapped__(ScBertLayer, ScBertConfig)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been built on this machine; the folder it is to be kept in."""
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path / "cache"))
    # another fingerprint, or the operators that are loaded already would be taken
    monkeypatch.setattr(
        compiled_layer_scbert, "FLAGS", (*compiled_layer_scbert.FLAGS, f"-DFRESH={tmp_path.name}")
    )
    return tmp_path / "cache" / "compiled"


def test_a_failing_compiler_is_reported_and_leaves_nothing(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "no such luck" >&2\nexit 1\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    report = build()
    assert report.operators is None and "no such luck" in str(report)
    assert not list(fresh.iterdir())


def test_no_compiler_is_reported(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    report = build()
    assert report.operators is None and "none was not found" in report.reason and "CXX" in report.reason


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_folder_that_others_can_write_is_refused(fresh):
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    report = build()
    assert report.operators is None and "SCBERT_CACHE" in report.reason
    assert fresh.stat().st_mode & stat.S_IWOTH


def test_a_broken_file_is_built_anew(fresh):
    fresh.mkdir(parents=True, mode=0o700)
    library = compiled_layer_scbert._library()
    library.write_bytes(b"cut short")
    report = build()
    assert report.operators is not None and report.error < MAX_ERROR
    assert library.stat().st_size > 10_000 and list(fresh.iterdir()) == [library]


def test_blocks_that_disagree_are_not_kept(monkeypatch):
    monkeypatch.setattr(compiled_layer_scbert, "MAX_ERROR", 0.0)
    report = build()
    assert report.operators is None and "relative error" in str(report)


# what a process does on its own: cells, tokens, width; the blocks it ends with
WORK = """
import logging, sys, torch
from scbert import ScBertConfig, ScBertModel
from scbert.modeling_scbert import blocks_scbert, workload_scbert
logging.basicConfig(level=logging.INFO, format="%(message)s")
tokens, width, expected = map(int, sys.argv[1:])
config = ScBertConfig(hidden_size=width, num_hidden_layers=1, max_position_embeddings=tokens)
model = ScBertModel(config).eval()
if expected:
    workload_scbert.expect_work(config, expected)
with torch.no_grad():
    model(torch.zeros(1, tokens, dtype=torch.long))
    print(blocks_scbert.choose_block(model.layers[0], torch.zeros(1, tokens, width)))
"""


@pytest.mark.parametrize(
    "tokens, width, expected, environment, chosen",
    [
        (300, 64, 10**12, {}, "chunked"),
        (2000, 200, 0, {}, "chunked"),
        (2000, 200, 10**9, {}, "compiled"),
        (2000, 200, 10**9, {"SCBERT_BACKEND": "-compiled"}, "chunked"),
        (300, 64, 0, {"SCBERT_BACKEND": "compiled"}, "compiled"),
        (2000, 200, 10**9, {"CXX": "none-such", "SCBERT_CACHE": "fresh"}, "chunked"),
    ],
    ids=["small cells", "little work", "much work", "forbidden", "asked for", "no compiler"],
)
def test_blocks_are_compiled_where_it_pays(tokens, width, expected, environment, chosen, tmp_path):
    if "SCBERT_CACHE" in environment:
        environment = environment | {"SCBERT_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORK, str(tokens), str(width), str(expected)],
        env={**os.environ, "SCBERT_BACKEND": "", **environment},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.stdout.strip() == chosen, run.stderr
    said = [line for line in run.stderr.splitlines() if "locks" in line]
    assert len(said) == (chosen == "compiled" or "CXX" in environment), run.stderr


def test_a_process_that_has_worked_for_long_goes_on_with_compiled_blocks(caplog):
    from scbert.modeling_scbert import workload_scbert

    layer, hidden = ScBertLayer(ScBertConfig(), 0).requires_grad_(False), torch.zeros(1, 2000, 200)
    before = dict(workload_scbert._work)
    try:
        with favor_backend("-onednn"):
            workload_scbert._work.update(expected=0.0, done=0.0)
            assert choose_block(layer, hidden) == "chunked"
            # an hour of one thread
            workload_scbert._work["done"] = 3600 * workload_scbert.FLOPS * torch.get_num_threads()
            assert choose_block(layer, hidden) == "compiled"
    finally:
        workload_scbert._work.update(before)
