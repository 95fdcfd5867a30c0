"""The examples in docstrings give what they say."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Spaces and entries of the Hub: run there, by their path
ELSEWHERE = (
    "evaluation/cell_annotation_metric/app.py",
    "evaluation/cell_annotation_metric/cell_annotation_metric.py",
)
RUN = re.compile(r">>> (?!.*doctest: \+SKIP)")


def modules_with_examples():
    """Paths below the root of the package's modules that have an example to run."""
    for folder in sorted(path.parent for path in ROOT.glob("*/__init__.py")):
        for path in sorted(folder.rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in ELSEWHERE and RUN.search(path.read_text()):
                yield name


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("scbert." + name.removesuffix(".py").replace("/", "."))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
