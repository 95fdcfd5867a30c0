"""How many files of the package a job runs through: a reader who follows a cell opens no more than these."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scbert.inference.annotate_cells import annotate
from scbert.training.run_finetune import finetune

ROOT = Path(__file__).resolve().parents[1]
# lower it when a detour goes
MOST_FILES_OF_ANNOTATE = 16
MOST_FILES_OF_FINETUNE = 30
# the goal is 21,000, not reached
MOST_LINES = 26_690


def files_run(job):
    """Files of the package with a function that `job` calls, in any thread; that a module is imported is no call."""
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>":
            found.add(code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        job()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    inside = {Path(name).relative_to(ROOT) for name in found if Path(name).is_relative_to(ROOT)}
    return sorted(str(path) for path in inside if path.parts[0] not in ("tests", ".venv"))


@pytest.fixture(autouse=True)
def no_messages(monkeypatch):
    """Without the handler that a test of the command line has left behind."""
    monkeypatch.setattr(logging.getLogger("scbert"), "handlers", [])


@pytest.fixture
def reference(adata, tmp_path):
    adata.write_h5ad(tmp_path / "reference.h5ad")
    return tmp_path / "reference.h5ad"


def test_fine_tuning_and_annotating_run_through_few_files(adata, reference, tmp_path):
    model = tmp_path / "model"
    learnt = files_run(lambda: finetune(reference, "cell_type", model, use_cpu=True))
    assert "training/run_finetune.py" in learnt and len(learnt) <= MOST_FILES_OF_FINETUNE, learnt
    asked = files_run(lambda: annotate(adata, model))
    assert "inference/annotate_cells.py" in asked and len(asked) <= MOST_FILES_OF_ANNOTATE, asked


def test_the_package_stays_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    beside = ("tests/", "docs/", "examples/", "scripts/", "benchmarks/")
    names = [name for name in listed.stdout.splitlines() if name.endswith((".py", ".cpp", ".h"))]
    package = [ROOT / name for name in names if not name.startswith(beside) and (ROOT / name).is_file()]
    assert sum(len(path.read_text().splitlines()) for path in package) <= MOST_LINES
