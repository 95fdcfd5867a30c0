from concurrent.futures import ThreadPoolExecutor

import anndata
import numpy as np
import pytest
import torch

from scbert import ScBertModel, ScBertTokenizer
from scbert.inference import embed, embed_file
from scbert.modeling_scbert.pipeline_scbert import mean_of_expressed
from scbert.tokenization import InputError
from scbert.trained_model.model_folder import load_model
from scbert.trained_model.prediction import predict


def test_mean_over_expressed_genes_and_the_trailing_token():
    hidden = torch.arange(10.0).reshape(1, 5, 2).repeat(2, 1, 1)
    ids = torch.tensor([[0, 3, 0, 1, 0], [2, 1, 0, 0, 0]])
    # the second cell has two genes, its trailing token at place 2, and two pads
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = mean_of_expressed(hidden, ids, mask)
    torch.testing.assert_close(found[0], hidden[0, [1, 3, 4]].mean(0))
    torch.testing.assert_close(found[1], hidden[1, [0, 1, 2]].mean(0))
    torch.testing.assert_close(mean_of_expressed(hidden[:1], ids[:1]), found[:1])


@pytest.mark.parametrize("tokenizer", [{}, {"keep_zeros": False}], ids=["every gene", "expressed genes"])
def test_embeddings_equal_the_plain_model(adata, make_model, tokenizer):
    folder = make_model(tokenizer=tokenizer)
    adata = adata[:15].copy()
    adata.X = adata.X.multiply((np.arange(15) != 4)[:, None]).tocsr()
    embedded = embed(adata, folder, batch_size=4, progress=False)
    found = embedded.obsm["X_scbert"]
    assert found.dtype == np.float32 and found.shape == (15, 16) and np.isfinite(found).all()
    assert "X_scbert" not in adata.obsm

    model, tokenizer = ScBertModel.from_pretrained(folder), ScBertTokenizer.from_pretrained(folder)
    bins = tokenizer.bin_cells(adata)
    for cell in range(15):
        encoded = {name: torch.from_numpy(x) for name, x in tokenizer.encode_bins(bins[cell]).items()}
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state[0]
        kept = encoded["input_ids"][0] > 0
        kept[-1] = True
        np.testing.assert_allclose(found[cell], hidden[kept].mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("outputs", [("embeddings", "logits"), ("pooled",)])
def test_threads_with_one_model_keep_their_cells_apart(adata, make_model, outputs):
    """Another thread runs the model on other cells while it is about to answer."""
    loaded = load_model(make_model())
    bins = loaded.tokenizer.bin_cells(adata)
    ((_, expected),) = predict(loaded, bins[:5], outputs)
    with ThreadPoolExecutor(1) as pool:

        def run_others(*passing):
            hook.remove()
            pool.submit(list, predict(loaded, bins[5:10], outputs)).result()

        hook = loaded.model.classifier.register_forward_hook(run_others)
        ((_, found),) = predict(loaded, bins[:5], outputs)
    for name in outputs:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_pretrained_model_embeds(adata, pretrained_dir):
    embedded = embed(adata, pretrained_dir, progress=False)
    assert embedded.obsm["X_scbert"].shape == (120, 16)
    assert embedded.uns["scbert_embedding"]["model"] == str(pretrained_dir)


def test_file_to_file(adata, query, model_dir, tmp_path):
    summary = embed_file(query, model_dir, tmp_path / "out.h5ad", progress=False)
    assert summary["cells"] == 120 and summary["hidden_size"] == 16
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(
        out.obsm["X_scbert"], embed(adata, model_dir, progress=False).obsm["X_scbert"]
    )
    assert (out.X != adata.X).nnz == 0
    with pytest.raises(InputError, match="already exists"):
        embed_file(query, model_dir, tmp_path / "out.h5ad", progress=False)


def test_half_precision_is_near(adata, model_dir):
    exact = embed(adata, model_dir, progress=False).obsm["X_scbert"]
    half = load_model(model_dir, "embedding", dtype="bfloat16")
    rounded = embed(adata, half, progress=False)
    assert rounded.uns["scbert_embedding"]["dtype"] == "bfloat16"
    correlation = np.corrcoef(exact.ravel(), rounded.obsm["X_scbert"].ravel())[0, 1]
    assert correlation > 0.99
    with pytest.raises(InputError, match="dtype"):
        load_model(model_dir, dtype="float99")
