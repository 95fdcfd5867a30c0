import json
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithPadding

from scbert.tokenization import InputError, ScBertTokenizer

PANEL = ["G1", "G2", "G3", "G4", "G5"]


@pytest.fixture
def tokenizer(gene_panel):
    return ScBertTokenizer(gene_panel=gene_panel)


@pytest.fixture
def short_tokenizer(gene_panel):
    """Expressed genes only."""
    return ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False)


def log1p_of(adata, target=1e4):
    logged = adata.copy()
    sums = np.asarray(logged.X.sum(1))
    logged.X = sp.csr_matrix(np.log1p(logged.X.toarray() / sums * target).astype(np.float32))
    return logged


def dense_reference(counts, names, panel, n_bins=5):
    """The preprocessing written densely: align, size factor, log2, floor, clip, trailing zero."""
    aligned = np.zeros((counts.shape[0], len(panel)))
    for j, name in enumerate(names):
        if name in panel:
            aligned[:, panel.index(name)] += counts[:, j]
    totals = aligned.sum(1, keepdims=True)
    scaled = np.divide(aligned * 1e4, totals, out=np.zeros_like(aligned), where=totals > 0)
    bins = sum((1 + scaled >= 2**k).astype(int) for k in range(1, n_bins + 1))
    return np.hstack([bins, np.zeros((len(bins), 1), dtype=int)])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), names=st.lists(st.sampled_from([*PANEL, "other"]), min_size=2, max_size=8))
def test_ids_equal_dense_reference(data, names):
    if not set(names) & set(PANEL):
        names = [*names, "G1"]
    rows = st.lists(st.integers(0, 60), min_size=len(names), max_size=len(names))
    counts = np.array(data.draw(st.lists(rows, min_size=1, max_size=5)))
    ids = ScBertTokenizer(gene_panel=PANEL)(counts, gene_names=names)["input_ids"]
    np.testing.assert_array_equal(ids, dense_reference(counts, names, PANEL))


def test_vocabulary():
    tokenizer = ScBertTokenizer(gene_panel=PANEL)
    assert (tokenizer.vocab_size, len(tokenizer)) == (7, 7)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 6)
    assert tokenizer.convert_ids_to_tokens([0, 5, 6]) == ["[BIN_0]", "[BIN_5]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(["[BIN_3]", "[MASK]"]) == [3, 6]
    assert ScBertTokenizer(gene_panel=PANEL, n_bins=51).mask_token_id == 52


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "int", "float64", "array", "csr_array"])
def test_every_layout_gives_the_same_ids(adata, tokenizer, layout):
    expected = tokenizer(adata)["input_ids"]
    x = adata.X
    adata.X = {
        "csr": x, "csc": x.tocsc(), "dense": x.toarray(), "int": x.astype(np.int32),
        "float64": x.astype(np.float64), "array": x, "csr_array": sp.csr_array(x),
    }[layout]  # fmt: skip
    cells = x.toarray() if layout == "array" else adata
    np.testing.assert_array_equal(tokenizer(cells)["input_ids"], expected)
    assert expected.shape == (120, 301) and expected.dtype == np.int64


def test_input_is_left_untouched(adata, tokenizer):
    before = adata.copy()
    tokenizer.bin_cells(adata)
    assert (before.X != adata.X).nnz == 0 and adata.X.has_sorted_indices
    pd.testing.assert_frame_equal(before.obs, adata.obs)


def test_gene_order_and_extra_genes_do_not_matter(adata, tokenizer):
    order = np.random.default_rng(0).permutation(adata.n_vars)
    shuffled = adata[:, order].copy()
    nines = sp.csr_matrix(np.full((120, 2), 9.0))
    extra = anndata.AnnData(nines, obs=adata.obs[[]], var=pd.DataFrame(index=["x1", "x2"]))
    both = anndata.concat([shuffled, extra], axis=1)
    assert (tokenizer.bin_cells(both) != tokenizer.bin_cells(adata)).nnz == 0


def test_a_cell_does_not_depend_on_its_batch(adata, tokenizer):
    bins = tokenizer.bin_cells(adata)
    singly = sp.vstack([tokenizer.bin_cells(adata[i]) for i in range(20)])
    chunked = sp.vstack(list(tokenizer.iter_bins(adata, chunk_size=7)))
    assert (singly != bins[:20]).nnz == 0 and (chunked != bins).nnz == 0


@pytest.mark.parametrize("target", [1e4, 2_000.0])
def test_log1p_of_all_genes_gives_the_ids_of_its_counts(adata, gene_panel, target):
    # half of the genes are in the panel: the size factor has to be taken anew
    tokenizer = ScBertTokenizer(gene_panel=gene_panel[:150])
    logged = log1p_of(adata, target)
    assert (tokenizer.bin_cells(logged) != tokenizer.bin_cells(adata)).nnz == 0
    assert (tokenizer.bin_cells(logged, input="log1p") != tokenizer.bin_cells(adata)).nnz == 0


def test_log1p_of_a_part_of_the_genes_is_divided_by_ln_2(adata, gene_panel):
    part = log1p_of(adata)[:, :100].copy()
    tokenizer = ScBertTokenizer(gene_panel=gene_panel[:100])
    with pytest.raises(InputError, match="--values log1p"):
        tokenizer.bin_cells(part)
    expected = np.minimum(np.floor(part.X.toarray() / np.log(2) * (1 + 1e-7)), 5)
    np.testing.assert_array_equal(tokenizer.bin_cells(part, input="log1p").toarray(), expected)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_duplicate_genes_are_summed(adata, tokenizer):
    doubled = anndata.concat([adata, adata[:, :2]], axis=1)
    counts = adata.copy().X.tolil()
    counts[:, :2] *= 2
    expected = tokenizer.bin_cells(counts.tocsr())
    assert (tokenizer.bin_cells(doubled) != expected).nnz == 0
    assert tokenizer.align(doubled).n_duplicates == 2
    # summed as counts, not as logarithms
    assert (tokenizer.bin_cells(log1p_of(doubled)) != expected).nnz == 0


def test_empty_cells_stay_empty(tokenizer, short_tokenizer, adata):
    adata.X = sp.diags_array((np.arange(120) != 3).astype(np.float32)) @ adata.X
    assert tokenizer(adata)["input_ids"][3].sum() == 0
    encoded = short_tokenizer(adata)
    assert encoded["attention_mask"][3].sum() == 1 and encoded["gene_ids"][3, 0] == 300


def test_layers_and_raw(adata, tokenizer):
    expected = tokenizer.bin_cells(adata)
    adata.raw = adata
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.toarray() - 3
    for layer in ("counts", "raw"):
        assert (tokenizer.bin_cells(adata, layer=layer) != expected).nnz == 0
    with pytest.raises(InputError, match=r"negative.*counts, raw"):
        tokenizer.bin_cells(adata)
    with pytest.raises(InputError, match="no layer 'spliced'"):
        tokenizer.bin_cells(adata, layer="spliced")


def test_no_matrix_is_refused(adata, tokenizer):
    adata.layers["counts"] = adata.X
    adata.X = None
    with pytest.raises(InputError, match=r"no matrix X.*counts"):
        tokenizer.bin_cells(adata)


def test_ensembl_ids_with_symbols_in_var(adata, tokenizer):
    expected = tokenizer.bin_cells(adata)
    adata.var["feature_name"] = list(adata.var_names)
    adata.var_names = [f"ENSG{i:011d}.3" for i in range(adata.n_vars)]
    assert (tokenizer.bin_cells(adata) != expected).nnz == 0
    del adata.var["feature_name"]
    with pytest.raises(InputError, match="Ensembl"):
        tokenizer.bin_cells(adata)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_impossible_values_are_refused_wherever_they_stand(adata, tokenizer, bad):
    adata.X[-1, -1] = bad
    with pytest.raises(InputError):
        tokenizer.bin_cells(adata)


def test_fractions_after_the_sample_are_not_taken_for_counts(tokenizer):
    counts = np.ones((3_000, 300), dtype=np.float32)
    counts[1_200, 5] = 0.5
    with pytest.raises(InputError, match="row 0 on have fractions"):
        tokenizer.bin_cells(counts)
    assert tokenizer.bin_cells(counts, input="counts").shape == (3_000, 300)


def test_counts_said_to_be_logs_are_refused(adata, tokenizer):
    adata.X[0, 0] = 800
    with pytest.raises(InputError, match="largest is 800.*--values counts"):
        tokenizer(adata, input="log1p")


def test_no_cells_and_wrong_widths_are_refused(adata, tokenizer):
    with pytest.raises(InputError, match="No cells"):
        tokenizer(adata[:0])
    with pytest.raises(InputError, match="299 columns for 300"):
        tokenizer(adata.X[:, :299])
    with pytest.raises(InputError, match="input must be one of"):
        tokenizer(adata, input="log2")


# expressed genes only


def test_expressed_genes_equal_the_full_sequence_less_its_zeros(adata, tokenizer, short_tokenizer):
    full, short = tokenizer(adata)["input_ids"], short_tokenizer(adata)
    for row, ids, genes, mask in zip(full, *(short[k] for k in ("input_ids", "gene_ids", "attention_mask"))):
        expressed = np.flatnonzero(row)
        n = len(expressed)
        np.testing.assert_array_equal(genes[:n], expressed)
        np.testing.assert_array_equal(ids[:n], row[expressed])
        assert genes[n] == 300 and ids[n] == 0 and mask.sum() == n + 1
        assert (ids[n:] == 0).all() and (genes[n:] == 300).all()


def test_long_cells_keep_a_random_subset_of_their_own(adata, gene_panel, short_tokenizer):
    cut = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False, max_length=50)
    bins = cut.bin_cells(adata)
    encoded = cut.encode_bins(bins)
    assert encoded["input_ids"].shape == (120, 50) and (encoded["gene_ids"][:, -1] == 300).all()
    full = cut.encode_bins(bins[5:6])
    np.testing.assert_array_equal(full["gene_ids"], encoded["gene_ids"][5:6])
    assert (np.diff(encoded["gene_ids"], axis=1) > 0).all()
    dense = bins.toarray()
    rows = np.arange(120)[:, None]
    np.testing.assert_array_equal(
        np.pad(dense, ((0, 0), (0, 1)))[rows, encoded["gene_ids"]], encoded["input_ids"]
    )
    other = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False, max_length=50, seed=1).encode_bins(bins)
    assert (other["gene_ids"] != encoded["gene_ids"]).any()


def test_modalities(adata, gene_panel):
    modalities = [0] * 200 + [1] * 100
    for keep_zeros in (True, False):
        tokenizer = ScBertTokenizer(
            gene_panel=gene_panel, feature_modalities=modalities, keep_zeros=keep_zeros
        )
        encoded = tokenizer(adata[:4])
        genes = encoded.get("gene_ids", np.broadcast_to(np.arange(301), (4, 301)))
        np.testing.assert_array_equal(encoded["modality_ids"], np.array([*modalities, 0])[genes])
    # one modality's counts do not move the other's ids
    adata.X = adata.X @ sp.diags_array(np.where(np.arange(300) < 200, 1, 7))
    again = tokenizer.bin_cells(adata[:4])
    plain = tokenizer.bin_cells(adata[:4, :200])
    assert (again[:, :200] != plain[:, :200]).nnz == 0


def test_quantile_binning(adata, gene_panel):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, binning="quantile", n_bins=10)
    bins = tokenizer.bin_cells(adata)
    assert bins.max() == 10 and bins.data.min() >= 1
    assert (bins.astype(bool) != adata.X.astype(bool)).nnz == 0


# Transformers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"binning": "quantile", "n_bins": 50, "keep_zeros": False, "max_length": 64, "seed": 7},
        {"n_bins": 18, "bin_width": 0.5, "target_sum": 1e3, "log_base": 10.0},
        {"feature_modalities": [0] * 150 + [1] * 150, "keep_zeros": False},
    ],
)
def test_round_trip_through_auto_tokenizer(tmp_path, adata, gene_panel, options):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, **options)
    for _ in range(2):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.gene_panel == gene_panel
        for name, value in options.items():
            assert np.array_equal(getattr(loaded, name), value)
        expected, found = tokenizer(adata[:5]), loaded(adata[:5])
        assert set(expected) == set(found) == set(loaded.model_input_names)
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])
        assert (loaded.vocab_size, loaded.mask_token_id) == (tokenizer.vocab_size, tokenizer.mask_token_id)
        tokenizer = loaded


@pytest.mark.parametrize("modalities", [None, [0, 0, 1, 1, 1]])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pad(modalities, side):
    tokenizer = ScBertTokenizer(
        gene_panel=PANEL, keep_zeros=False, feature_modalities=modalities, padding_side=side
    )
    cells = [tokenizer(np.array([row])) for row in ([5, 0, 0, 0, 0], [9, 9, 9, 0, 1])]
    items = [{name: values[0] for name, values in cell.items()} for cell in cells]
    batch = tokenizer.pad(items, return_tensors="np")
    if side == "right":
        together = tokenizer(np.array([[5, 0, 0, 0, 0], [9, 9, 9, 0, 1]]))
        for name in together:
            np.testing.assert_array_equal(batch[name], together[name])
    else:
        assert batch["gene_ids"][0].tolist() == [5, 5, 5, 0, 5]
        assert batch["attention_mask"][0].tolist() == [0, 0, 0, 1, 1]
    assert torch.is_tensor(DataCollatorWithPadding(tokenizer)(items)["gene_ids"])


def test_stock_masking_collator_never_masks_zeros(adata, tokenizer):
    torch.manual_seed(0)
    encoded = tokenizer(adata[:8])
    items = [{"input_ids": row.tolist()} for row in encoded["input_ids"]]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)(items)
    masked = batch["labels"] != -100
    assert masked.any() and (batch["labels"][masked] > 0).all()


def test_a_saved_tokenizer_loads_with_other_options(tmp_path, gene_panel, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    other = ScBertTokenizer.from_pretrained(tmp_path, n_bins=9, keep_zeros=False)
    new = ScBertTokenizer(gene_panel=gene_panel, n_bins=9, keep_zeros=False)
    assert other.mask_token_id == 10 and other.all_special_ids == new.all_special_ids
    assert other.model_input_names == new.model_input_names


def test_code_travels_with_a_saved_folder(tmp_path, adata, gene_panel):
    script = """
import json, sys
sys.modules["scbert"] = None
from transformers import AutoTokenizer
import numpy as np
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(tokenizer(np.load(sys.argv[2]))["input_ids"].tolist()))
"""
    # registering marks the class for good, so it is done where nobody else sees it
    save = "import sys; from scbert.tokenization import ScBertTokenizer as T; T.register_for_auto_class()\n"
    save += "T(gene_panel=sys.argv[1].split()).save_pretrained(sys.argv[2])"
    folder = tmp_path / "model"
    subprocess.run([sys.executable, "-c", save, " ".join(gene_panel), str(folder)], check=True, cwd=tmp_path)
    assert (folder / "tokenization_scbert.py").is_file() and (folder / "gene_panel.txt").is_file()
    counts = adata.X[:3].toarray()
    np.save(tmp_path / "counts.npy", counts)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "counts.npy")],
        check=True, cwd=tmp_path, capture_output=True, text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    expected = ScBertTokenizer(gene_panel=gene_panel)(counts)["input_ids"]
    np.testing.assert_array_equal(json.loads(done.stdout), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a gene panel"),
        ({"gene_panel": []}, "no gene names"),
        ({"gene_panel": ["A", "A"]}, "more than once"),
        ({"gene_panel": PANEL, "binning": "log"}, "binning must be one of"),
        ({"gene_panel": PANEL, "n_bins": 0}, "n_bins"),
        ({"gene_panel": PANEL, "log_base": 1.0}, "log_base"),
        ({"gene_panel": PANEL, "bin_width": -1}, "bin_width"),
        ({"gene_panel": PANEL, "max_length": 3}, "keep_zeros=False"),
        ({"gene_panel": PANEL, "max_length": 1, "keep_zeros": False}, "at least 2"),
        ({"gene_panel": PANEL, "feature_modalities": [0]}, "feature_modalities"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        ScBertTokenizer(**options)
