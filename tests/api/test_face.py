"""`scbert.annotate` and its like: an AnnData or a path in, an AnnData, a model or a table of genes out."""

import json
import subprocess
import sys

import numpy as np
import pytest

import scbert
from scbert.training import callbacks

FACE = ["annotate", "embed", "explain", "finetune", "load_model", "pretrain", "InputError"]
CLASSES = ["Config", "ForCellClassification", "ForMaskedExpression", "Model", "Tokenizer"]
TINY = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 32,
    "num_random_features": 8, "classifier_hidden_sizes": [],
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model": TINY, "training": {"num_train_epochs": 1, "use_cpu": True}}))
    return path


def test_the_face_and_nothing_else_is_shown():
    assert sorted(dir(scbert)) == sorted([*FACE, *(f"ScBert{name}" for name in CLASSES), "__version__"])
    for name in dir(scbert):
        assert getattr(scbert, name) is not None
    assert callable(scbert.interpretation.gene_attention)


def test_importing_takes_nothing_along():
    script = (
        "import scbert, sys; print(len({'torch', 'transformers', 'numpy', 'anndata'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_cells_in_a_model_out(adata, recipe, tmp_path):
    before = adata.copy()
    model = scbert.finetune(adata, "cell_type", recipe=recipe, min_genes=0)
    assert 0 <= model.metrics["test_accuracy"] <= 1
    annotated = model.annotate(adata, progress=False)
    assert "scbert_cell_type" in annotated.obs and "scbert_cell_type" not in adata.obs
    assert adata.obs.equals(before.obs) and not adata.uns
    assert model.embed(adata, progress=False).obsm["X_scbert"].shape == (120, 16)
    kept = scbert.load_model(model.save(tmp_path / "kept"))
    assert kept.metrics == model.metrics and kept.labels == model.labels
    again = scbert.annotate(adata, kept, progress=False)
    np.testing.assert_array_equal(again.obsm["scbert_probabilities"], annotated.obsm["scbert_probabilities"])
    with pytest.raises(scbert.InputError, match="already exists"):
        model.save(tmp_path / "kept")
    temporary = model.folder
    del model
    assert not temporary.exists()


def test_a_path_is_as_good_as_cells(adata, tmp_path):
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    options = {"force": True, "progress": False}
    from_file, from_memory = scbert.annotate(path, **options), scbert.annotate(adata, **options)
    assert from_file.obs["scbert_cell_type"].equals(from_memory.obs["scbert_cell_type"])
    np.testing.assert_array_equal(
        scbert.embed(path, **options).obsm["X_scbert"], scbert.embed(adata, **options).obsm["X_scbert"]
    )


def test_pretrained_from_cells_then_fine_tuned(adata, recipe):
    pretrained = scbert.pretrain(adata, recipe=recipe, min_genes=0)
    assert "masked_accuracy" in pretrained.metrics and "no cell types" in repr(pretrained)
    for asked in (pretrained.annotate, pretrained.explain):
        with pytest.raises(scbert.InputError, match="has no cell types yet"):
            asked(adata)
    tuned = scbert.finetune(adata, "cell_type", base=pretrained, epochs=1, min_genes=0, recipe="scbert")
    assert tuned.labels == ["B cell", "T cell", "monocyte"]


def test_pretraining_on_cells_in_memory_goes_on_where_it_was_stopped(adata, recipe, tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    options = {"output": tmp_path / "model", "recipe": recipe, "min_genes": 0}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks.CompleteCheckpoints, "on_save", stop)
        scbert.pretrain(adata, **options)
    with pytest.raises(scbert.InputError, match="begun with other .*cells or labels"):
        scbert.pretrain(adata[:100].copy(), resume=True, **options)
    assert scbert.pretrain(adata, resume=True, **options).folder == tmp_path / "model"


def test_genes_of_every_type(adata):
    pytest.importorskip("captum")
    genes = scbert.explain(adata, force=True, cells_per_type=2, n_steps=4, n_top=5)
    b_cell = genes[genes["cell_type"] == "B cell"]
    assert list(b_cell["rank"]) == [1, 2, 3, 4, 5]
    assert {"MS4A1", "CD79A"} & set(b_cell["gene"])


def test_genes_of_one_type_that_the_model_knows(adata):
    pytest.importorskip("captum")
    quick = {"force": True, "cells_per_type": 2, "n_steps": 4, "n_top": 2}
    assert set(scbert.explain(adata, cell_types="B cell", **quick)["cell_type"]) == {"B cell"}
    with pytest.raises(scbert.InputError, match="no cell type B cells; its types are: B cell, "):
        scbert.explain(adata, cell_types=["B cell", "B cells"], **quick)


def test_a_face_of_its_own_for_every_error():
    with pytest.raises(scbert.InputError, match="no model folder"):
        scbert.load_model("nowhere")
    with pytest.raises(scbert.InputError, match="no file"):
        scbert.annotate("nowhere.h5ad")
