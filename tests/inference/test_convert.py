import gzip
import importlib.util
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from scbert.inference.convert_original import convert
from scbert.tokenization import InputError

GENES = [f"GENE{i}" for i in range(23)]


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parents[1] / "modeling_scbert" / "original_reference.py"
    spec = importlib.util.spec_from_file_location("original_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def original(reference, tmp_path):
    """A function that writes an original checkpoint, returning it and its path."""

    def write(labels=None):
        model = reference.rounded(reference.make_original(labels=labels))
        path = tmp_path / "original.pth"
        torch.save(reference.original_checkpoint(model, "module."), path)
        return model, path

    return write


@pytest.fixture
def genes(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("\n".join(GENES) + "\n")
    return path


def leftovers(tmp_path):
    return {path.name for path in tmp_path.iterdir() if path.is_dir()}


@pytest.mark.parametrize(
    "labels, auto", [(None, AutoModelForMaskedLM), (3, AutoModelForSequenceClassification)]
)
def test_folder_loads_and_reloads_to_the_same_logits(original, genes, tmp_path, labels, auto):
    theirs, path = original(labels)
    summary = convert(path, genes, tmp_path / "model")
    assert summary["genes"] == 23 and summary["layers"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.gene_panel == GENES
    cells = np.random.default_rng(0).poisson(1.0, (2, 23))
    ids = tokenizer(cells, return_tensors="pt")["input_ids"]
    first = auto.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = first(ids).logits
    wanted = torch.cat([theirs(cell).logits for cell in ids.split(1)])
    assert (logits - wanted).abs().max() < 1e-4
    first.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(auto.from_pretrained(tmp_path / "again")(ids).logits, logits)
    assert AutoModel.from_pretrained(tmp_path / "again")(ids).last_hidden_state.shape == (2, 24, 20)


def test_label_file_names_the_classes(original, genes, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("B cell\nCD8+/CD45RA+\nNK\n")
    summary = convert(original(3)[1], genes, tmp_path / "model", labels=labels)
    assert summary["labels"] == ["B cell", "CD8+/CD45RA+", "NK"]


def test_panels_of_every_kind(original, tmp_path, genes):
    path = original()[1]
    (tmp_path / "genes.txt.gz").write_bytes(gzip.compress(genes.read_bytes()))
    (tmp_path / "genes.csv").write_text("gene\n" + ",1\n".join(GENES) + ",1\n")
    cells = anndata.AnnData(np.zeros((1, 23), np.float32))
    cells.var_names = GENES
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for name in ("genes.txt", "genes.txt.gz", "genes.csv", "cells.h5ad"):
        convert(path, tmp_path / name, tmp_path / "model", overwrite=True)
        assert AutoTokenizer.from_pretrained(tmp_path / "model").gene_panel == GENES


def test_nothing_is_left_when_it_fails(original, genes, tmp_path, monkeypatch):
    path = original()[1]
    (tmp_path / "few.txt").write_text("A\nB\n")
    with pytest.raises(InputError, match="2 genes"):
        convert(path, tmp_path / "few.txt", tmp_path / "model")
    (tmp_path / "broken.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match="broken"):
        convert(path, tmp_path / "broken.h5ad", tmp_path / "model")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        convert(truncated, genes, tmp_path / "model")
    from scbert.tokenization import ScBertTokenizer

    monkeypatch.setattr(
        ScBertTokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError):
        convert(path, genes, tmp_path / "model")
    assert not leftovers(tmp_path)


def test_existing_output_is_kept(original, genes, tmp_path):
    path = original()[1]
    convert(path, genes, tmp_path / "model")
    with pytest.raises(InputError, match="already exists"):
        convert(path, genes, tmp_path / "model")
    convert(path, genes, tmp_path / "model", overwrite=True)
    assert leftovers(tmp_path) == {"model"}
