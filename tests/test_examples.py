"""The scripts that the documentation shows run to their end, one after the other in one folder."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# what each prints when it did its job; later ones read what earlier ones wrote
ORDER = {
    "prepare_cells": "",
    "finetune": "cells not learnt from: macro-F1",
    "annotate": "cells are assigned",
    "embed": "(234, 32)",
    "explain": "Deletion test",
    "pipelines": "(32,)",
    "evaluate": "logistic_l2",
    "pretrain": "hidden bins guessed right",
    "convert": "23 genes",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_original(folder):
    path = ROOT / "tests" / "modeling_scbert" / "original_reference.py"
    spec = importlib.util.spec_from_file_location("original_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    model = reference.rounded(reference.make_original())
    torch.save(reference.original_checkpoint(model, ""), folder / "original.pth")
    (folder / "genes.txt").write_text("\n".join(f"GENE{i}" for i in range(23)) + "\n")


@pytest.mark.parametrize("name", ORDER)
def test_example(name, folder, monkeypatch, capsys):
    if name == "explain":
        pytest.importorskip("captum")
    if name == "convert":
        write_original(folder)
    monkeypatch.chdir(folder)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ORDER[name] in capsys.readouterr().out


def test_the_model_by_itself(folder, monkeypatch):
    """The snippet of the quickstart that is no example of its own, on the model that the examples made."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    examples = {path.read_text() for path in EXAMPLES.glob("*.py")}
    (snippet,) = [snippet for snippet in snippets if snippet not in examples]
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(snippet, "quickstart.md", "exec"), names)
    assert names["label"].shape == names["confidence"].shape == (8,)


def test_every_example_is_run_and_shown():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(ORDER)
    shown = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    # as it stands, since a page on GitHub draws in no file
    assert not {path.stem for path in EXAMPLES.glob("*.py") if path.read_text() not in shown}
