"""annotate_file: every format in, one .h5ad out, memory flat."""

import gzip
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.io
import scipy.sparse as sp

from scbert.inference import annotate, annotate_file
from scbert.inference.assignment import COLUMNS
from scbert.tokenization import InputError


def probabilities(path):
    return anndata.read_h5ad(path).obsm["scbert_probabilities"]


@pytest.fixture
def expected(adata, model_dir):
    return annotate(adata, model_dir, progress=False).obsm["scbert_probabilities"]


def test_all_that_was_in_the_file_is_still_there(adata, model_dir, tmp_path, expected):
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata[:, :200].copy()
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(120, 2))
    adata.obsp["distances"] = sp.random(120, 120, 0.1, format="csr", random_state=0)
    adata.uns["colors"] = {"cell_type": np.array(["red", "blue"], dtype=object)}
    adata.obs["nullable"] = pd.array([1, None] * 60, dtype="Int64")
    adata.obs["text"] = [f"cell/{i}" for i in range(120)]
    adata.var["chromosome"] = pd.Categorical(["1", "2"] * 150)
    path, output = tmp_path / "rich.h5ad", tmp_path / "out.h5ad"
    adata.write_h5ad(path, compression="gzip")
    content = path.read_bytes()
    annotate_file(path, model_dir, output, progress=False)
    assert path.read_bytes() == content

    before, after = anndata.read_h5ad(path), anndata.read_h5ad(output)
    np.testing.assert_array_equal(after.obsm["scbert_probabilities"], expected)
    assert list(after.obs.columns[: len(before.obs.columns)]) == list(before.obs.columns)
    pd.testing.assert_frame_equal(after.obs[before.obs.columns], before.obs)
    pd.testing.assert_frame_equal(after.var, before.var)
    for one, other in ((after.X, before.X), (after.layers["counts"], before.layers["counts"])):
        assert (one != other).nnz == 0
    assert (after.raw.X != before.raw.X).nnz == 0
    assert (after.obsp["distances"] != before.obsp["distances"]).nnz == 0
    np.testing.assert_array_equal(after.obsm["X_umap"], before.obsm["X_umap"])
    assert list(after.uns["colors"]["cell_type"]) == ["red", "blue"]
    # the values are copied as they lie in the file
    with h5py.File(path) as one, h5py.File(output) as other:
        assert one["X/data"].compression == other["X/data"].compression == "gzip"
    # labels with slashes and of any script survive
    assert list(after.uns["scbert"]["labels"]) == ["B cell", "CD8+/CD45RA+ T", "单核细胞"]


@pytest.mark.parametrize("layer", ["counts", "raw"])
def test_layer_of_a_file(adata, model_dir, tmp_path, expected, layer):
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata
    adata.X = np.full(adata.shape, -1.5)
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    annotate_file(tmp_path / "scaled.h5ad", model_dir, tmp_path / "out.h5ad", layer=layer, progress=False)
    np.testing.assert_array_equal(probabilities(tmp_path / "out.h5ad"), expected)
    assert (anndata.read_h5ad(tmp_path / "out.h5ad").X == -1.5).all()


def test_zarr_and_10x(adata, model_dir, tmp_path, expected):
    adata.write_zarr(tmp_path / "cells.zarr")
    folder = tmp_path / "filtered_feature_bc_matrix"
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(adata.X.T.astype(int)))
    features = [f"ID{i}\t{name}\tGene Expression" for i, name in enumerate(adata.var_names)]
    for name, lines in (("features.tsv.gz", features), ("barcodes.tsv.gz", adata.obs_names)):
        with gzip.open(folder / name, "wt") as file:
            file.write("\n".join(lines) + "\n")
    for number, source in enumerate((tmp_path / "cells.zarr", folder)):
        annotate_file(source, model_dir, tmp_path / f"out{number}.h5ad", progress=False)
        np.testing.assert_array_equal(probabilities(tmp_path / f"out{number}.h5ad"), expected)
        assert list(anndata.read_h5ad(tmp_path / f"out{number}.h5ad").obs_names) == list(adata.obs_names)


def test_mudata(adata, model_dir, tmp_path, expected):
    # as often scaled, and named as genes
    proteins = anndata.AnnData(np.full((120, 2), -1.0), adata.obs[[]], pd.DataFrame(index=["CD14", "CD19"]))
    cells = pytest.importorskip("mudata").MuData({"rna": adata, "prot": proteins})
    cells.write(tmp_path / "cells.H5MU")
    annotate_file(tmp_path / "cells.H5MU", model_dir, tmp_path / "out.h5ad", progress=False)
    np.testing.assert_array_equal(probabilities(tmp_path / "out.h5ad"), expected)


def test_proteins_are_not_added_to_the_genes_of_their_names(adata, model_dir, tmp_path, expected):
    proteins = anndata.AnnData(np.full((120, 2), 300.0), adata.obs[[]], pd.DataFrame(index=["CD14", "CD19"]))
    both = anndata.concat([adata, proteins], axis=1, merge="first")
    both.var["feature_types"] = ["Gene Expression"] * 300 + ["Antibody Capture"] * 2
    both.write_h5ad(tmp_path / "cells.h5ad")
    for number, processes in enumerate((None, 1)):
        output = tmp_path / f"out{number}.h5ad"
        annotate_file(tmp_path / "cells.h5ad", model_dir, output, progress=False, processes=processes)
        np.testing.assert_array_equal(probabilities(output), expected)


def test_tables_as_arrays(model_dir, tmp_path):
    """As anndata wrote them before 0.7, and scanpy still ships one."""
    source = Path(scanpy.datasets.__file__).with_name("10x_pbmc68k_reduced.h5ad")
    options = {"layer": "raw", "input": "log1p", "force": True, "progress": False}
    annotate_file(source, model_dir, tmp_path / "out.h5ad", **options)
    after = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert "CD4+/CD25 T Reg" in set(after.obs["bulk_labels"])
    assert after.obsm["scbert_probabilities"].shape == (700, 3)


def test_annotating_again_replaces_the_columns(adata, query, model_dir, make_model, tmp_path, caplog):
    first, second = tmp_path / "first.h5ad", tmp_path / "second.h5ad"
    adata.obs["scbert_of_mine"] = "kept"
    adata.write_h5ad(query)
    options = {"label_ontology_ids": {"B cell": "CL:0000236"}, "label_parents": {"B cell": "lymphocyte"}}
    other = make_model("other", seed=5, conformal_quantiles={"0.9": [0.9] * 3}, **options)
    annotate_file(query, other, first, coverage=0.9, majority_vote="leiden", progress=False)
    assert {*COLUMNS} <= {*anndata.read_h5ad(first).obs}
    annotate_file(first, model_dir, second, progress=False)
    assert f"earlier annotation were replaced or removed: {', '.join(COLUMNS)}." in caplog.text
    again = annotate(anndata.read_h5ad(first), model_dir, majority_vote="scbert_leiden", progress=False)
    assert {"scbert_leiden", "scbert_majority_vote", "scbert_of_mine"} <= {*again.obs}
    assert "scbert_cell_type_backoff" not in again.obs
    direct = tmp_path / "direct.h5ad"
    annotate_file(query, model_dir, direct, progress=False)
    pd.testing.assert_frame_equal(anndata.read_h5ad(second).obs, anndata.read_h5ad(direct).obs)
    assert list(anndata.read_h5ad(second).obs.columns).count("scbert_cell_type") == 1


def test_backed_anndata_in_memory_call(query, model_dir, expected):
    backed = anndata.read_h5ad(query, backed="r")
    annotated = annotate(backed, model_dir, progress=False)
    assert not annotated.isbacked
    np.testing.assert_array_equal(annotated.obsm["scbert_probabilities"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["X", "layers/counts"])
def test_memory_does_not_grow_with_the_cells(make_model, tmp_path, place):
    """Twice the cells: 240 MB more in the file, hardly more in memory."""
    panel = [f"G{i}" for i in range(4000)]
    model = make_model(panel=panel, num_hidden_layers=1, tokenizer={"keep_zeros": False, "max_length": 20})
    script = "import sys; from scbert.commands.cli import main; sys.exit(main())"
    options = ["--overwrite", *(["--layer", "counts"] if place != "X" else [])]
    peaks = []
    # both above what is kept between the passes
    for cells in (15_000, 30_000):
        path = _large_file(tmp_path / f"{cells}.h5ad", cells, panel, place)
        peaks.append(
            _peak([script, "annotate", path, "--model", model, "--output", tmp_path / "out.h5ad", *options])
        )
        path.unlink()
    print("peaks in MiB:", peaks)
    assert peaks[1] - peaks[0] < 100


def _peak(arguments):
    """Peak memory of a Python process in MiB."""
    wrapper = (
        "import resource, subprocess, sys; code = subprocess.call([sys.executable, '-c', *sys.argv[1:]]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024); sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", wrapper, *map(str, arguments)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.split()[-1])


def _large_file(path, cells, panel, place, per_cell=2000):
    """An .h5ad of `per_cell` ones a cell, written in blocks, uncompressed."""
    adata = anndata.AnnData(
        sp.csr_matrix((cells, len(panel)), dtype="float32"),
        obs=pd.DataFrame(index=[str(i) for i in range(cells)]),
    )
    adata.var_names = panel
    if place != "X":
        adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(path)
    columns = np.sort(np.random.default_rng(0).permutation(len(panel))[:per_cell]).astype(np.int32)
    with h5py.File(path, "r+") as file:
        group = file[place]
        for name, block in (("data", np.ones(per_cell, np.float32)), ("indices", columns)):
            del group[name]
            dataset = group.create_dataset(
                name, shape=(cells * per_cell,), dtype=block.dtype, chunks=(1 << 18,)
            )
            for start in range(0, cells, 1000):
                dataset[start * per_cell : (start + 1000) * per_cell] = np.tile(block, 1000)
        group["indptr"][...] = np.arange(cells + 1) * per_cell
    return path


def test_labels_as_csv(query, model_dir, tmp_path):
    annotate_file(query, model_dir, tmp_path / "whole.h5ad", progress=False)
    annotate_file(query, model_dir, tmp_path / "labels.csv", progress=False)
    whole, labels = (
        anndata.read_h5ad(tmp_path / "whole.h5ad"),
        pd.read_csv(tmp_path / "labels.csv", index_col="cell"),
    )
    assert list(labels.index) == list(whole.obs_names)
    assert list(labels["scbert_cell_type"]) == list(whole.obs["scbert_cell_type"])
    with pytest.raises(InputError, match=r"must be named \.h5ad or \.csv"):
        annotate_file(query, model_dir, tmp_path / "labels.txt", progress=False)
