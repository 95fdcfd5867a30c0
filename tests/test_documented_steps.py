"""What the documentation tells to type works as written, in its order, on small data."""

import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scbert import ScBertForMaskedExpression
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
    "docs/howto_convert.md",
    "docs/howto_multiomic.md",
    "docs/howto_backends.md",
    "docs/howto_cluster.md",
    "docs/scaling.md",
    "docs/evaluation.md",
]
# what a page takes for granted, made by the command of another page
NEEDED = {
    "docs/howto_annotate.md": ["my_model"],
    "docs/howto_explain.md": ["my_model"],
    "docs/howto_finetune.md": ["pretrained"],
    "docs/howto_backends.md": ["my_model"],
    "docs/scaling.md": ["my_model"],
    "docs/evaluation.md": ["my_model"],
}
MADE_BY = {
    "my_model": "scbert finetune reference.h5ad --label-key cell_type --output my_model",
    "pretrained": "scbert pretrain reference.h5ad --output pretrained --epochs 1",
}
# of the environment, not of this package; or served until it is stopped
NOT_RUN = ("pip ", "make ", "hf ", "scbert app")
# added to what would take minutes even on small cells
FEWER = {
    "scbert pretrain both.h5ad": ["--max-steps", "3", "--batch-size", "8"],
    "scbert finetune both.h5ad": ["--epochs", "1", "--batch-size", "8"],
    "scbert finetune reference.h5ad --label-key cell_type --output from_base": ["--epochs", "1"],
    "scbert finetune reference.h5ad --label-key cell_type --base": ["--epochs", "1"],
    "python -m scbert.training.run_finetune": ["--num_train_epochs", "1"],
    "scbert evaluate modalities": ["--folds", "2", "--epochs", "1", "--max-cells", "40"],
    "scbert evaluate cross-validation": ["--folds", "2"],
    "accelerate launch --config_file training/accelerate/ddp.yaml -m scbert.training.run_pretrain": [
        "--max_steps", "2", "--per_device_train_batch_size", "4"
    ],
}  # fmt: skip
# how this interpreter runs what stands first in a line
PROGRAMS = {
    "python": [],
    "scbert": ["-m", "scbert"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith(NOT_RUN):
                yield line


def run(line):
    words = shlex.split(line, comments=True)
    words += next((options for start, options in FEWER.items() if line.startswith(start)), [])
    if words[0] == "scbert":
        return cli.main(words[1:])
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        variables |= [words.pop(0).split("=", 1)]
    program, *arguments = words
    if arguments[0].startswith("scripts/"):
        arguments[0] = str(ROOT / arguments[0])
    return subprocess.run(
        [sys.executable, *PROGRAMS[program], *arguments], env=os.environ | variables
    ).returncode


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


def write_multiomic_cells(new_cells):
    for kind, seed in (("", 0), ("new_", 1)):
        rna = new_cells(90, seed=seed)
        names = [f"chr1:{1000 * number}-{1000 * number + 500}" for number in range(1, 31)]
        open_peaks = np.random.default_rng(seed).random((90, 30)) < 0.4
        atac = anndata.AnnData(sp.csr_matrix(open_peaks, dtype=np.float32), var=pd.DataFrame(index=names))
        atac.obs_names = rna.obs_names
        rna.write_h5ad(f"{kind}rna.h5ad"), atac.write_h5ad(f"{kind}atac.h5ad")
    pytest.importorskip("mudata").MuData({"rna": rna, "atac": atac}).write("cells.h5mu")
    write_10x_multiome("multiome.h5", rna, atac)
    rna.write_h5ad("cells.h5ad")
    os.remove("query.h5ad")


def write_10x_multiome(path, rna, atac):
    """A Cell Ranger ARC file: features x cells, genes and peaks."""
    matrix = sp.hstack([rna.X, atac.X], format="csr").astype(np.int32)
    features = {
        "id": [f"ENSG{number:011d}" for number in range(rna.n_vars)] + list(atac.var_names),
        "name": [*rna.var_names, *atac.var_names],
        "feature_type": ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars,
        "genome": ["GRCh38"] * (rna.n_vars + atac.n_vars),
    }
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"], group["barcodes"] = matrix.shape[::-1], np.array(list(rna.obs_names), "S")
        for name, values in features.items():
            group[f"features/{name}"] = np.array(values, "S")


def write_original_checkpoints(new_cells):
    path = ROOT / "tests" / "modeling_scbert" / "original_reference.py"
    spec = importlib.util.spec_from_file_location("original_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, labels in (("panglao_pretrain", None), ("finetuned", 3)):
        model = reference.rounded(reference.make_original(labels=labels))
        torch.save(reference.original_checkpoint(model, ""), f"{name}.pth")
    cells = new_cells(10)[:, :23].copy()
    cells.write_h5ad("panglao_10000.h5ad")
    Path("genes.txt").write_text("\n".join(cells.var_names) + "\n")
    Path("labels.txt").write_text("B cell\nT cell\nmonocyte\n")


def write_cells(new_cells):
    new_cells(90).write_h5ad("cells.h5ad")


def write_few_labels_and_wider_types(new_cells):
    new_cells(24, seed=7).write_h5ad("few_labels.h5ad")
    lineages = {"B cell": "lymphocyte", "T cell": "lymphocyte", "monocyte": "myeloid cell"}
    pd.DataFrame(lineages.items(), columns=["label", "parent"]).to_csv("tree.csv", index=False)
    reference = new_cells(150)
    reference.obs["lineage"] = reference.obs["cell_type"].map(lineages)
    reference.write_h5ad("reference.h5ad")


def write_more_cells_and_configurations(new_cells):
    new_cells(60, seed=4).write_h5ad("more.h5ad")
    new_cells(60, seed=5).write_h5ad("listed.h5ad")
    Path("files.csv").write_text("path,donor\nlisted.h5ad,d1\n")
    new_cells(60, seed=6).write_h5ad("atlas.h5ad")
    shipped, here = ROOT / "training" / "accelerate" / "ddp.yaml", Path("training/accelerate")
    here.mkdir(parents=True)
    # as many processes as a test may take
    text = shipped.read_text().replace("num_processes: 8", "num_processes: 2")
    (here / "ddp.yaml").write_text(text)


def write_cells_and_markers(new_cells):
    write_cells(new_cells)
    types = [("B cells", "MS4A1"), ("B cells", "CD79A"), ("T cells", "CD3D"), ("Monocytes", "LYZ")]
    table = pd.DataFrame(types, columns=["cell type", "official gene symbol"]).assign(species="Mm Hs")
    table.to_csv("PanglaoDB.tsv.gz", sep="\t", index=False)
    Path("sets.gmt").write_text(
        "B_CELLS\tna\tMS4A1\tCD79A\tCD79B\tCD19\nT_CELLS\tna\tCD3D\tCD3E\tCD2\tTRAC\n"
    )


WRITTEN_BY = {
    "docs/howto_finetune.md": write_few_labels_and_wider_types,
    "docs/howto_convert.md": write_original_checkpoints,
    "docs/howto_multiomic.md": write_multiomic_cells,
    "docs/howto_backends.md": write_cells,
    "docs/scaling.md": write_more_cells_and_configurations,
    "docs/evaluation.md": write_cells_and_markers,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page, cells_folder, new_cells):
    WRITTEN_BY.get(page, lambda _: None)(new_cells)
    for name in NEEDED.get(page, ()):
        assert run(MADE_BY[name]) == 0
    for line in commands(page):
        assert run(line) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md"])
def test_the_scripts_of_the_readme(page, cells_folder, capsys):
    """The second goes on with the model and the cells of the first."""
    pytest.importorskip("captum")
    script, as_transformers = blocks(page, "python")
    assert len(script.splitlines()) <= 13
    names = {}
    exec(compile(script, page, "exec"), names)
    assert "B cell" in capsys.readouterr().out
    exec(compile(as_transformers, page, "exec"), names)
    assert names["outputs"].probabilities.shape == (60, 3)
    annotated = anndata.read_h5ad("annotated.h5ad")
    assert {"scbert_cell_type", "scbert_confidence"} <= set(annotated.obs)
    agree = annotated.obs["scbert_cell_type"].astype(str) == annotated.obs["cell_type"].astype(str)
    assert agree.mean() > 0.9
    assert Path("my_model/config.json").is_file() and list(Path("figures").glob("*types.png"))


@pytest.mark.slow
def test_a_model_grown_by_peaks(tmp_path, monkeypatch, adata):
    """The snippet of the page on several modalities, on a base of expressed genes."""
    monkeypatch.chdir(tmp_path)
    adata.write_h5ad("cells.h5ad")
    assert (
        run("scbert pretrain cells.h5ad --recipe scmbert --output rna_base --max-steps 1 --batch-size 2") == 0
    )
    (snippet,) = blocks("docs/howto_multiomic.md", "python")
    exec(compile(snippet, "snippet", "exec"), {})
    grown = ScBertForMaskedExpression.from_pretrained("grown")
    assert grown.config.max_position_embeddings == 303 and grown.config.num_modalities == 2


def snippets_of_the_backends_page():
    for number, snippet in enumerate(blocks("docs/howto_backends.md", "python")):
        yield pytest.param(snippet, id=str(number), marks=pytest.mark.slow)


@pytest.mark.parametrize("snippet", snippets_of_the_backends_page())
def test_snippets_of_the_backends_page(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what a snippet sets of the log is put back
    monkeypatch.setattr(logging.getLogger("scbert"), "level", logging.INFO)
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    if "peft" in snippet:
        pytest.importorskip("peft")
    exec(compile(snippet, "snippet", "exec"), {})


class FolderOfRepositories:
    """The part of HfApi that pushing asks for; a repository is a folder of this machine."""

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def repo_info(self, repo_id, **options):
        return SimpleNamespace(private=True)

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            path = Path("hub", repo_id, operation.path_in_repo)
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        return SimpleNamespace(repo_url=f"https://hub.invalid/{repo_id}")


@pytest.mark.slow
def test_commands_of_the_hub_page(cells_folder, monkeypatch):
    """Pushed and used by name, without the network; its second snippet is run as an example."""
    monkeypatch.setattr("scbert.model_cards.push.HfApi", FolderOfRepositories)
    download = "scbert.trained_model.model_folder.snapshot_download"
    monkeypatch.setattr(download, lambda repo_id, **options: f"hub/{repo_id}")
    assert run(MADE_BY["my_model"]) == 0
    for line in commands("docs/howto_hub.md"):
        assert run(line) == 0, line
    annotated = anndata.read_h5ad("annotated.h5ad")
    assert "scbert_cell_type" in annotated.obs
    # a folder of the name that the repository has
    os.rename("hub/OWNER", "OWNER")
    names = {"counts": annotated.X, "symbols": list(annotated.var_names)}
    exec(compile(blocks("docs/howto_hub.md", "python")[0], "snippet", "exec"), names)


@pytest.mark.slow
def test_settings_of_the_encoders_page(cells_folder):
    """They are a recipe. The study that the page ends with takes hours; tests/scripts runs it on tiny models."""
    (settings,) = blocks("docs/howto_encoders.md", "json")
    Path("lsh.json").write_text(settings)
    line = "scbert pretrain reference.h5ad --recipe lsh.json --output pretrained --max-steps 1 --batch-size 2"
    assert run(line) == 0
    assert ScBertForMaskedExpression.from_pretrained("pretrained").config.reversible
