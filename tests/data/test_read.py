import gzip
import math

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from scbert.data import read
from scbert.data.read import log_normalize, matrix_rows, read_cells, read_gene_names, to_counts_scale
from scbert.data.read_backed import open_cells
from scbert.tokenization import InputError, ScBertTokenizer


def same(a, b):
    return (sp.csr_matrix(a) != sp.csr_matrix(b)).nnz == 0


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "int", "float64"])
@pytest.mark.parametrize("backed", [False, True])
def test_h5ad_in_every_layout(tmp_path, adata, layout, backed):
    x = adata.X
    adata.X = {
        "csr": x, "csc": x.tocsc(), "dense": x.toarray(), "int": x.astype(np.int64),
        "float64": x.astype(np.float64),
    }[layout]  # fmt: skip
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    cells = read_cells(path, backed=backed)
    assert cells.shape == adata.shape and cells.isbacked == backed
    matrix, names = matrix_rows(cells)
    assert names == list(adata.var_names)
    assert same(matrix[10:30], x[10:30]) and same(matrix[0:120], x)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("layer", [None, "counts", "raw"])
def test_chunks_of_every_matrix(tmp_path, adata, layout, layer, monkeypatch):
    # several blocks of columns even in a small file
    monkeypatch.setattr(read, "COLUMN_BLOCK", 500)
    make = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda m: m.toarray()}[layout]
    expected = adata.X
    adata.X = make(expected)
    adata.layers["counts"] = make(expected)
    adata.raw = adata
    if layer:
        adata.X = make(expected * 2)
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    for cells in (read_cells(path, layer=layer, backed=True), adata):
        matrix, _ = matrix_rows(cells, layer)
        chunks = [sp.csr_matrix(matrix[start : start + 50]) for start in (0, 50, 100)]
        assert [chunk.shape for chunk in chunks] == [(50, 300), (50, 300), (20, 300)]
        assert same(sp.vstack(chunks), expected)


def test_csc_rows_are_gathered_for_several_slices(tmp_path, adata, monkeypatch):
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(read, "KEPT_VALUES", adata.X.nnz // 2)
    matrix, _ = matrix_rows(read_cells(tmp_path / "cells.h5ad", backed=True))
    gathered = []
    gather = matrix._gather
    matrix._gather = lambda *rows: gathered.append(rows) or gather(*rows)
    chunks = [matrix[start : start + 10] for start in range(0, 120, 10)]
    assert same(sp.vstack(chunks), adata.X) and gathered == [(0, 60), (60, 120)]


def test_csc_with_empty_columns_and_rows(tmp_path):
    dense = np.zeros((6, 7), dtype=np.float32)
    dense[1, 2], dense[4, 2], dense[4, 6] = 3, 1, 2
    adata = anndata.AnnData(sp.csc_matrix(dense))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = read_cells(tmp_path / "cells.h5ad", backed=True)
    matrix, _ = matrix_rows(backed)
    np.testing.assert_array_equal(matrix[0:6].toarray(), dense)
    np.testing.assert_array_equal(matrix[4:5].toarray(), dense[4:5])


def test_backed_cells_tokenise_like_cells_in_memory(tmp_path, adata, gene_panel):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel)
    expected = tokenizer.bin_cells(adata)
    for name, x in (("csr", adata.X), ("csc", adata.X.tocsc()), ("dense", adata.X.toarray())):
        anndata.AnnData(x, obs=adata.obs, var=adata.var).write_h5ad(tmp_path / f"{name}.h5ad")
        matrix, names = matrix_rows(read_cells(tmp_path / f"{name}.h5ad", backed=True))
        assert same(tokenizer.bin_cells({"X": matrix, "gene_names": names}), expected)


def test_zarr(tmp_path, adata):
    adata.write_zarr(tmp_path / "cells.zarr")
    assert same(read_cells(tmp_path / "cells.zarr").X, adata.X)


def write_10x(folder, adata, compress, prefix="", features="features.tsv", kinds=True):
    folder.mkdir(exist_ok=True)
    ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    kind = "\tGene Expression" if kinds else ""
    texts = {
        features: "".join(f"{i}\t{s}{kind}\n" for i, s in zip(ids, adata.var_names)),
        "barcodes.tsv": "".join(f"{name}\n" for name in adata.obs_names),
    }
    scipy.io.mmwrite(folder / "m.mtx", adata.X.T.astype(int))
    content = {name: text.encode() for name, text in texts.items()}
    content["matrix.mtx"] = (folder / "m.mtx").read_bytes()
    (folder / "m.mtx").unlink()
    for name, data in content.items():
        name = prefix + name + (".gz" if compress else "")
        (folder / name).write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize(
    "options",
    [
        {"compress": True},
        {"compress": False, "features": "genes.tsv", "kinds": False},
        {"compress": True, "prefix": "GSM123_"},
    ],
)
def test_10x_folder(tmp_path, adata, options):
    write_10x(tmp_path / "run", adata, **options)
    # as macOS leaves them beside every file of an archive
    (tmp_path / "run" / "._matrix.mtx").write_bytes(b"\0\5\26\7")
    cells = read_cells(tmp_path / "run")
    assert same(cells.X, adata.X) and list(cells.obs_names) == list(adata.obs_names)
    assert list(cells.var_names) == list(adata.var_names)
    assert cells.var["gene_ids"].iloc[2] == "ENSG00000000002"


def test_incomplete_10x_folders_are_refused(tmp_path, adata):
    write_10x(tmp_path / "run", adata, compress=False)
    barcodes = tmp_path / "run" / "barcodes.tsv"
    text = barcodes.read_text()
    barcodes.write_text(text + "one_more\n")
    with pytest.raises(InputError, match="121 barcodes"):
        read_cells(tmp_path / "run")
    barcodes.unlink()
    with pytest.raises(InputError, match=r"needs features.tsv"):
        read_cells(tmp_path / "run")
    barcodes.write_text(text)
    (tmp_path / "run" / "s2_matrix.mtx").write_text("")
    with pytest.raises(InputError, match="one sample into one folder"):
        read_cells(tmp_path / "run")


@pytest.mark.parametrize("version", [2, 3])
def test_10x_h5(tmp_path, adata, version):
    path = tmp_path / "filtered.h5"
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(adata.X, name).astype(np.int64)
        group["shape"] = [adata.n_vars, adata.n_obs]
        group.create_dataset("barcodes", data=list(adata.obs_names), dtype=text)
        ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
        if version == 2:
            group.create_dataset("genes", data=ids, dtype=text)
            group.create_dataset("gene_names", data=list(adata.var_names), dtype=text)
        else:
            kinds = ["Gene Expression"] * 290 + ["Antibody Capture"] * 10
            for name, values in (("id", ids), ("name", list(adata.var_names)), ("feature_type", kinds)):
                group.create_dataset(f"features/{name}", data=values, dtype=text)
    cells = read_cells(path)
    n = 290 if version == 3 else 300
    assert cells.shape == (120, n) and same(cells.X, adata.X[:, :n])
    assert list(cells.var_names) == list(adata.var_names[:n])
    assert read_cells(path, every_feature=True).shape == (120, 300)


# bad input at the door


@pytest.fixture
def h5ad(tmp_path, adata):
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def test_missing_file_and_plain_folder(tmp_path, adata):
    for matrix in (adata.to_df(), adata.X):
        with pytest.raises(InputError, match=f"found a {type(matrix).__name__}. Make an AnnData"):
            read_cells(matrix)
    with pytest.raises(InputError, match="There is no file"):
        read_cells(tmp_path / "none.h5ad")
    with pytest.raises(InputError, match=r"is a folder.*h5ad"):
        read_cells(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("backed", [False, True])
def test_files_cut_short(h5ad, share, backed):
    data = h5ad.read_bytes()
    h5ad.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"cells\.h5ad"):
        matrix_rows(read_cells(h5ad, backed=backed))[0][:]


def test_damaged_inside(h5ad):
    data = bytearray(h5ad.read_bytes())
    data[2048:6000] = bytes(3952)
    h5ad.write_bytes(data)
    with pytest.raises(InputError, match=r"cells\.h5ad"):
        read_cells(h5ad)


@pytest.mark.parametrize(("name", "words"), [("a.csv", "Convert it to .h5ad"), ("a.h5ad", "not valid HDF5")])
def test_other_kinds_of_file(tmp_path, name, words):
    (tmp_path / name).write_text("gene,cell\n1,2\n")
    with pytest.raises(InputError, match=words):
        read_cells(tmp_path / name)


def test_hdf5_that_is_no_anndata(tmp_path):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["numbers"] = np.arange(3)
    with pytest.raises(InputError):
        read_cells(tmp_path / "a.h5ad")


@pytest.mark.parametrize("shape", [(0, 300), (120, 0)])
def test_no_cells_or_genes(tmp_path, adata, shape):
    adata[: shape[0], : shape[1]].copy().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="at least one of each"):
        read_cells(tmp_path / "a.h5ad")


@pytest.mark.parametrize(("bad", "words"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1, "negative")])
@pytest.mark.parametrize("dense", [True, False])
def test_impossible_values(tmp_path, adata, gene_panel, bad, words, dense):
    adata.layers["counts"] = adata.X.copy()
    x = adata.X.toarray()
    x[60, 7] = bad
    adata.X = x if dense else sp.csr_matrix(x)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=words):
        read_cells(tmp_path / "a.h5ad")
    tokenizer = ScBertTokenizer(gene_panel=gene_panel)
    matrix, names = matrix_rows(read_cells(tmp_path / "a.h5ad", backed=True))
    with pytest.raises(InputError, match=words):
        list(tokenizer.iter_bins({"X": matrix, "gene_names": names}, chunk_size=50))
    # only the layer that is used has to be sound
    assert read_cells(tmp_path / "a.h5ad", layer="counts").n_obs == 120
    with pytest.raises(InputError, match="no layer 'other'"):
        read_cells(tmp_path / "a.h5ad", layer="other")


@pytest.mark.parametrize("opened", [read_cells, open_cells, lambda path: read_cells(path, backed=True)])
def test_a_matrix_of_one_dimension(h5ad, opened):
    with h5py.File(h5ad, "r+") as file:
        del file["X"]
        file["X"] = np.ones(120, dtype=np.float32)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(InputError, match=r"has shape \(120,\); two dimensions, cells x genes"):
        opened(h5ad)


@pytest.mark.parametrize("dense", [True, False])
def test_a_matrix_of_zeros(tmp_path, adata, dense):
    adata.layers["counts"] = adata.X
    adata.X = np.zeros(adata.shape) if dense else sp.csr_matrix(adata.shape)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=r"Every value of .* is zero.*also has: counts \(layer=NAME"):
        read_cells(tmp_path / "a.h5ad")
    assert read_cells(tmp_path / "a.h5ad", layer="counts").n_obs == 120


def test_duplicate_names_are_read_in_silence(tmp_path, adata, recwarn):
    adata.var_names = ["SAME", "SAME", *adata.var_names[2:]]
    adata.obs_names = ["one"] * 120
    adata.write_h5ad(tmp_path / "a.h5ad")
    recwarn.clear()
    assert read_cells(tmp_path / "a.h5ad").n_obs == 120
    assert not recwarn.list


def test_gene_names_of_files(tmp_path, adata, gene_panel):
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert read_gene_names(tmp_path / "a.h5ad") == gene_panel
    (tmp_path / "a.txt").write_text("\n".join(gene_panel))
    assert read_gene_names(tmp_path / "a.txt") == gene_panel
    with pytest.raises(InputError, match="no gene file"):
        read_gene_names(tmp_path / "none.txt")


def test_log_normalize_by_hand_and_from_log_values():
    adata = anndata.AnnData(np.array([[1, 2, 1], [0, 5, 0]], dtype=np.float32))
    adata.var_names = ["A", "B", "A"]
    values, names = log_normalize(adata)
    assert names == ["A", "B"]
    expected = [[math.log1p(5000), math.log1p(5000)], [0, math.log1p(10_000)]]
    np.testing.assert_allclose(values.toarray(), expected, rtol=1e-6)
    logged = anndata.AnnData(values.toarray(), var=pd.DataFrame(index=names))
    np.testing.assert_allclose(log_normalize(logged)[0].toarray(), expected, rtol=1e-5)


def test_log1p_returns_to_the_scale_of_counts(adata):
    counts = adata.X.toarray().astype(float)
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 500.0).astype(np.float32)
    back = to_counts_scale(sp.csr_matrix(logged), "log1p")
    np.testing.assert_allclose(back.sum(1), 1e4, rtol=1e-4)
    same = sp.csr_matrix(counts)
    assert to_counts_scale(same, "counts") is same
