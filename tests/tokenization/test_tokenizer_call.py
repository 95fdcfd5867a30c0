"""Calling the tokenizer as transformers' users do: what it takes for cells, lengths and padding."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.utils import PaddingStrategy

from scbert.tokenization import InputError, ScBertTokenizer
from scbert.tokenization.cells_scbert import raw_hint


@pytest.fixture
def tokenizer(gene_panel):
    return ScBertTokenizer(gene_panel=gene_panel)


@pytest.fixture
def short_tokenizer(gene_panel):
    """Expressed genes only."""
    return ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False)


def test_dictionary_and_single_cell(adata, tokenizer):
    expected = tokenizer(adata[:1])["input_ids"]
    names = list(adata.var_names)
    np.testing.assert_array_equal(tokenizer({"X": adata.X[:1], "gene_names": names})["input_ids"], expected)
    np.testing.assert_array_equal(tokenizer(adata.X[0].toarray()[0])["input_ids"], expected)
    # a matrix in the form of a dictionary is still a matrix
    np.testing.assert_array_equal(tokenizer(adata.X[:1].todok())["input_ids"], expected)


def test_return_tensors(adata, tokenizer):
    assert torch.is_tensor(tokenizer(adata[:3], return_tensors="pt")["input_ids"])
    assert set(tokenizer(adata[:3])) == {"input_ids"}


def test_data_frames_have_genes_as_columns(adata, tokenizer):
    expected = tokenizer(adata)["input_ids"]
    frame = adata.to_df()
    np.testing.assert_array_equal(tokenizer(frame[frame.columns[::-1]])["input_ids"], expected)
    sparse = pd.DataFrame.sparse.from_spmatrix(adata.X, columns=adata.var_names)
    np.testing.assert_array_equal(tokenizer(sparse)["input_ids"], expected)
    np.testing.assert_array_equal(tokenizer(frame.iloc[3])["input_ids"], expected[3:4])
    # numbers of pandas' own, booleans among numbers, and what is missing
    counts = pd.DataFrame([[1, 0, 3], [0, 1, 0]], columns=tokenizer.gene_panel[:3])
    wanted = tokenizer(counts)["input_ids"]
    for kinds in ("Int64", {counts.columns[1]: bool}, {counts.columns[0]: "Float32"}):
        np.testing.assert_array_equal(tokenizer(counts.astype(kinds))["input_ids"], wanted)
    with pytest.raises(InputError, match="NaN"):
        tokenizer(counts.astype("Int64").mask(counts == 3))
    with pytest.raises(InputError, match=r"rows of this DataFrame.*\.T"):
        tokenizer(frame.T)
    with pytest.raises(InputError, match=r"do not hold numbers \(first: cell_type\)"):
        tokenizer(frame.assign(cell_type="B cell"))


@pytest.mark.parametrize("path", ["cells.h5ad", Path("cells.h5ad")])
def test_paths_are_to_be_read_first(tokenizer, path):
    with pytest.raises(TypeError, match=r"'cells.h5ad'.*anndata.read_h5ad"):
        tokenizer(path)


@pytest.mark.parametrize("shape", [(300,), ()])
def test_matrices_without_two_dimensions_are_refused(tokenizer, adata, shape):
    cells = SimpleNamespace(X=np.ones(shape), layers={}, var=adata.var, var_names=adata.var_names)
    with pytest.raises(InputError, match="two dimensions, cells x genes"):
        tokenizer(cells)


def test_genes_cut_to_a_subset_point_to_raw(tokenizer, adata):
    adata.raw = adata
    cut = adata[:, :1].copy()
    cut.var_names = ["NOT-IN-THE-PANEL"]
    words = r"\.raw holds 300 of them \(layer='raw', or --layer raw\)"
    with pytest.raises(InputError, match=words):
        tokenizer(cut)
    with pytest.raises(InputError, match=f"30 of the model's 300 genes.*{words}"):
        tokenizer.align(adata[:, :30]).check()
    assert raw_hint(adata, tokenizer.gene_panel) == raw_hint(cut, tokenizer.gene_panel, "raw") == ""


def test_padding_and_length_as_transformers_has_them(adata, short_tokenizer):
    cells = adata[:4]
    plain = short_tokenizer(cells)
    longest = plain["input_ids"].shape[1]
    for padding in (True, "longest", PaddingStrategy.LONGEST):
        padded = short_tokenizer(cells, padding=padding, truncation=True, return_tensors="pt")
        assert all(torch.equal(padded[name], torch.from_numpy(plain[name])) for name in plain)
    wide = short_tokenizer(cells, padding="max_length", max_length=longest + 7)
    assert wide["gene_ids"].shape == (4, longest + 7) and (wide["gene_ids"][:, longest:] == 300).all()
    assert (wide["attention_mask"].sum(1) == plain["attention_mask"].sum(1)).all()
    ragged = short_tokenizer(cells, padding=False)
    assert [len(row) for row in ragged["gene_ids"]] == plain["attention_mask"].sum(1).tolist()
    again = short_tokenizer.pad(ragged, return_tensors="np")
    assert all(np.array_equal(again[name], plain[name]) for name in plain)
    with pytest.raises(ValueError, match="padding=True"):
        short_tokenizer(cells, padding=False, return_tensors="pt")


def test_length_of_one_call(adata, gene_panel, short_tokenizer):
    cut = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False, max_length=50)
    expected = cut(adata[:9])
    found = short_tokenizer(adata[:9], truncation=True, max_length=50)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    whole = cut(adata[:9], truncation=False)
    assert np.array_equal(whole["gene_ids"], short_tokenizer(adata[:9])["gene_ids"])
    assert cut(adata[:9], max_length=20)["input_ids"].shape == (9, 20)
    with pytest.raises(InputError, match="at least 2"):
        short_tokenizer(adata, max_length=1)


def test_cells_with_every_gene_have_one_length(adata, tokenizer):
    for options in ({"padding": True}, {"padding": "max_length", "truncation": True}, {"max_length": 400}):
        assert tokenizer(adata[:2], **options)["input_ids"].shape == (2, 301)
    for options in ({"max_length": 50}, {"padding": "max_length", "max_length": 400}):
        with pytest.raises(InputError, match=r"all cells have 301 tokens.*keep_zeros=False"):
            tokenizer(adata[:2], **options)
