"""What the documentation tells to type works as written, in its order, on small data."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scbert.commands import cli
from scbert.inference.shipped import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
# pages whose commands need nothing but cells and what earlier commands of the page made
PAGES = [
    "README.md",
    "docs/quickstart.md",
    "docs/howto_annotate.md",
    "docs/howto_explain.md",
    "docs/howto_finetune.md",
    "docs/howto_pretrain.md",
]
# what a page takes for granted, made by the command of another page
NEEDED = {
    "docs/howto_annotate.md": ["my_model"],
    "docs/howto_explain.md": ["my_model"],
    "docs/howto_finetune.md": ["pretrained"],
}
MADE_BY = {
    "my_model": "scbert finetune reference.h5ad --label-key cell_type --output my_model",
    "pretrained": "scbert pretrain reference.h5ad --output pretrained --epochs 1",
}
# of the environment, not of this package; or served until it is stopped
NOT_RUN = ("pip ", "make ", "hf ", "scbert app")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith(NOT_RUN):
                yield line


def run(line):
    words = shlex.split(line, comments=True)
    if words[0] == "scbert":
        return cli.main(words[1:])
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]]).returncode


@pytest.fixture
def cells_folder(tmp_path, monkeypatch, new_cells):
    """A working folder with cells under the names of the documentation."""
    monkeypatch.chdir(tmp_path)
    new_cells(150).write_h5ad("reference.h5ad")
    new_cells(60, seed=1).write_h5ad("query.h5ad")
    os.mkdir("cells")
    for number in range(2):
        new_cells(80, seed=2 + number).write_h5ad(f"cells/{number}.h5ad")
    genes = (SHIPPED["blood"] / "gene_panel.txt").read_text().split()
    counts = sp.random(40, len(genes), 0.05, "csr", np.float32, np.random.default_rng(0))
    counts.data = np.ceil(counts.data * 5)
    anndata.AnnData(counts, var=pd.DataFrame(index=genes)).write_h5ad("my_cells.h5ad")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page, cells_folder):
    for name in NEEDED.get(page, ()):
        assert run(MADE_BY[name]) == 0
    for line in commands(page):
        assert run(line) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md"])
def test_the_script_of_the_readme(page, cells_folder, capsys):
    pytest.importorskip("captum")
    (script,) = blocks(page, "python")
    assert len(script.splitlines()) <= 13
    exec(compile(script, page, "exec"), {})
    assert "B cell" in capsys.readouterr().out
    annotated = anndata.read_h5ad("annotated.h5ad")
    assert {"scbert_cell_type", "scbert_confidence"} <= set(annotated.obs)
    agree = annotated.obs["scbert_cell_type"].astype(str) == annotated.obs["cell_type"].astype(str)
    assert agree.mean() > 0.9
    assert Path("my_model/config.json").is_file() and list(Path("figures").glob("*types.png"))
