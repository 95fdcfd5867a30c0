import logging

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scbert import ScBertForCellClassification, ScBertTokenizer
from scbert.inference import annotate, annotate_file, embed, embed_file
from scbert.inference import query as query_module
from scbert.tokenization import InputError
from scbert.trained_model import prediction
from scbert.trained_model.model_folder import load_model
from scbert.trained_model.prediction import pick_batch_size

EXPRESSED_ONLY = {"keep_zeros": False}


def probabilities(annotated):
    return annotated.obsm["scbert_probabilities"]


def test_annotation_contract(adata, model_dir):
    before = adata.copy()
    annotated = annotate(adata, model_dir, progress=False)

    assert list(annotated.obs_names) == list(adata.obs_names)
    assert (annotated.X != before.X).nnz == 0
    assert annotated.X.dtype == before.X.dtype
    for column in before.obs:
        assert annotated.obs[column].equals(before.obs[column])
    found = probabilities(annotated)
    assert found.dtype == np.float32
    assert found.shape == (adata.n_obs, 3)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(annotated.obs["scbert_confidence"], found.max(1))
    labels = annotated.uns["scbert"]["labels"]
    assert list(labels) == load_model(model_dir).labels
    sure = found.max(1) >= 0.5
    assert sure.sum() > 0
    assert (annotated.obs["scbert_cell_type"][sure] == labels[found.argmax(1)][sure]).all()
    assert (annotated.obs["scbert_cell_type"][~sure] == "unassigned").all()
    assert annotated.uns["scbert"]["threshold"] == 0.5
    assert annotated.uns["scbert"]["gene_overlap"]["matched"] == 300
    assert set(annotated.uns["scbert"]["versions"]) >= {"scbert-transformers", "torch", "transformers"}
    # the input is left as it was
    assert list(adata.obs) == list(before.obs) and not adata.uns and not adata.obsm


def test_equals_the_plain_model_cell_by_cell(adata, model_dir):
    adata = adata[:12].copy()
    tokenizer = ScBertTokenizer.from_pretrained(model_dir)
    model = ScBertForCellClassification.from_pretrained(model_dir).eval()
    encoded = tokenizer(adata, return_tensors="pt")
    with torch.no_grad():
        rows = [model(**{name: row[None] for name, row in zip(encoded, cell, strict=True)}).logits
                for cell in zip(*encoded.values(), strict=True)]  # fmt: skip
    expected = torch.cat(rows).softmax(-1).numpy()
    np.testing.assert_allclose(probabilities(annotate(adata, model_dir, progress=False)), expected, atol=1e-5)


@pytest.mark.parametrize("tokenizer", [{}, EXPRESSED_ONLY], ids=["every gene", "expressed genes"])
@pytest.mark.parametrize("attention_type", ["favor", "softmax"])
def test_batches_and_order_change_nothing(adata, make_model, tokenizer, attention_type):
    model = load_model(make_model(tokenizer=tokenizer, attention_type=attention_type))
    adata = adata[:40].copy()
    together = probabilities(annotate(adata, model, progress=False))
    alone = probabilities(annotate(adata, model, batch_size=1, progress=False))
    odd = probabilities(annotate(adata, model, batch_size=7, progress=False))
    order = np.random.default_rng(0).permutation(adata.n_obs)
    shuffled = probabilities(annotate(adata[order], model, batch_size=7, progress=False))
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(odd, together, atol=1e-5)
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)


def test_empty_cells_are_unassigned_with_confidence_zero(adata, model_dir, caplog):
    adata.X = adata.X.multiply((~np.isin(np.arange(120), [2, 77]))[:, None]).tocsr()
    annotated = annotate(adata, model_dir, threshold=0, progress=False)
    assert list(annotated.obs["scbert_cell_type"].iloc[[2, 77]]) == ["unassigned"] * 2
    assert (annotated.obs["scbert_confidence"].iloc[[2, 77]] == 0).all()
    assert (annotated.obs["scbert_cell_type"] == "unassigned").sum() == 2
    assert "2 cell(s) express no gene" in caplog.text


def test_threshold(adata, model_dir):
    strict = annotate(adata, model_dir, threshold=1, progress=False).obs
    assert ((strict["scbert_cell_type"] == "unassigned") == (strict["scbert_confidence"] < 1)).all()
    assert (strict["scbert_cell_type"] == "unassigned").mean() > 0.5
    nothing = annotate(adata, model_dir, threshold=0, progress=False).obs["scbert_cell_type"]
    assert "unassigned" not in set(nothing)
    for wrong in (1.5, "0.5"):
        with pytest.raises(InputError, match="threshold"):
            annotate(adata, model_dir, threshold=wrong)


def test_gene_order_extra_genes_and_duplicates(adata, model_dir):
    expected = probabilities(annotate(adata, model_dir, progress=False))
    order = np.random.default_rng(0).permutation(adata.n_vars)
    other = anndata.concat(
        [adata[:, order], anndata.AnnData(np.ones((adata.n_obs, 5), "float32"), obs=adata.obs)],
        axis=1,
        merge="same",
    )
    other.var_names = [*adata.var_names[order], *(f"NOT-IN-PANEL-{i}" for i in range(5))]
    np.testing.assert_allclose(probabilities(annotate(other, model_dir, progress=False)), expected, atol=1e-6)

    # the counts of a gene split over two columns of its name
    half = sp.csr_matrix(np.floor(adata.X.toarray() / 2))
    split = anndata.AnnData(sp.hstack([half, adata.X - half], format="csr"), obs=adata.obs)
    split.var_names = [*adata.var_names, *adata.var_names]
    annotated = annotate(split, model_dir, progress=False)
    np.testing.assert_allclose(probabilities(annotated), expected, atol=1e-6)
    assert annotated.uns["scbert"]["gene_overlap"]["duplicates"] == 300


def test_low_overlap_is_refused_unless_forced(adata, model_dir, caplog):
    few = adata[:, :80].copy()
    with pytest.raises(InputError, match=r"80 of the model's 300 genes.*--force"):
        annotate(few, model_dir)
    with caplog.at_level(logging.WARNING, "scbert"):
        assert annotate(few, model_dir, force=True, progress=False).n_obs == adata.n_obs
    assert "80 of the model's 300 genes found (26.7%)" in caplog.text


def test_log1p_input_gives_the_labels_of_the_counts(adata, model_dir):
    counts = annotate(adata, model_dir, progress=False)
    logged = adata.copy()
    totals = np.asarray(adata.X.sum(1)).ravel()
    logged.X = sp.csr_matrix(np.log1p(adata.X.toarray() / totals[:, None] * 1e4).astype(np.float32))
    annotated = annotate(logged, model_dir, progress=False)
    np.testing.assert_allclose(probabilities(annotated), probabilities(counts), atol=1e-5)


def test_layer_and_raw(adata, model_dir):
    expected = probabilities(annotate(adata, model_dir, progress=False))
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata
    adata.X = np.full(adata.shape, -1.5)
    np.testing.assert_array_equal(
        probabilities(annotate(adata, model_dir, layer="counts", progress=False)), expected
    )
    np.testing.assert_array_equal(
        probabilities(annotate(adata, model_dir, layer="raw", progress=False)), expected
    )
    with pytest.raises(InputError, match="no layer 'missing'"):
        annotate(adata, model_dir, layer="missing")


def test_results_do_not_depend_on_chunks(adata, model_dir, query, tmp_path, monkeypatch):
    expected = probabilities(annotate(adata, model_dir, progress=False))
    monkeypatch.setattr(query_module, "CHUNK_SIZE", 13)
    # nothing kept in memory: the file is read twice
    monkeypatch.setattr(query_module, "KEPT_BYTES", 0)
    annotate_file(query, model_dir, tmp_path / "out.h5ad", progress=False)
    found = probabilities(anndata.read_h5ad(tmp_path / "out.h5ad"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_bad_value_in_the_last_cell_is_told_before_the_model_runs(adata, model_dir, monkeypatch):
    monkeypatch.setattr(query_module, "CHUNK_SIZE", 50)
    adata.X[-1, 5] = np.nan
    monkeypatch.setattr(prediction, "_forward", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="NaN"):
        annotate(adata, model_dir)


def test_batch_too_large_for_the_gpu_is_halved(adata, model_dir, monkeypatch):
    expected = probabilities(annotate(adata, model_dir, progress=False))
    forward, sizes = prediction._forward, []

    def small_memory(loaded, encoded, embed):
        n_cells = len(encoded["input_ids"])
        if n_cells > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(n_cells)
        return forward(loaded, encoded, embed)

    monkeypatch.setattr(prediction, "_forward", small_memory)
    annotated = annotate(adata, model_dir, batch_size=64, progress=False)
    np.testing.assert_allclose(probabilities(annotated), expected, atol=1e-5)
    assert max(sizes) <= 20


def test_the_batch_size_is_said(adata, model_dir, tmp_path, caplog):
    caplog.set_level("INFO", logger="scbert")
    adata.write_h5ad(tmp_path / "query.h5ad")
    annotate_file(tmp_path / "query.h5ad", model_dir, tmp_path / "out.h5ad", batch_size=7, progress=False)
    assert "Batches of 7 cells of 301 tokens." in caplog.text


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_no_batch_is_refused(adata, query, tmp_path, size):
    for job in (annotate, embed):
        with pytest.raises(InputError, match="batch size"):
            job(adata, tmp_path / "never looked at", batch_size=size)
    for job in (annotate_file, embed_file):
        with pytest.raises(InputError, match="batch size"):
            job(query, tmp_path / "never looked at", tmp_path / "out.h5ad", batch_size=size)


def test_batch_size_follows_the_size_of_the_model(make_model):
    small = load_model(make_model())
    assert pick_batch_size(small, 301) > 1
    assert pick_batch_size(small, 10**7) == 1
    assert pick_batch_size(small, 1) == prediction.MAX_BATCH
