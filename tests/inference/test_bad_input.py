"""Bad input through the command line: one clear paragraph, exit code 1, nothing half-written."""

import hashlib
import json
import os
import shutil

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from scbert.commands.cli import main


@pytest.fixture
def run(capsys):
    """Function that runs `scbert` in this process and returns exit code, stdout and stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(run, model_dir, tmp_path):
    """Function that annotates and checks the refusal: message, exit code, and that nothing changed on disk."""

    def refused(query, message, *options, model=None, output=None):
        output = output or tmp_path / "out.h5ad"
        before = _fingerprint(tmp_path)
        code, out, err = run("annotate", query, "--model", model or model_dir, "--output", output, *options)
        assert code == 1, err
        assert out == ""
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and err.strip().endswith(errors[0]), err
        assert message.lower() in errors[0].lower()
        assert "Traceback" not in err and "LOAD REPORT" not in err
        assert _fingerprint(tmp_path) == before
        return errors[0]

    return refused


def _fingerprint(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def written(adata, tmp_path, name="bad.h5ad"):
    adata.write_h5ad(tmp_path / name)
    return tmp_path / name


# the file


def test_missing_file(refused, tmp_path):
    refused(tmp_path / "absent.h5ad", "there is no file")


def test_truncated_file(refused, query, tmp_path):
    content = query.read_bytes()
    for share in (2, 10, 1000):
        bad = tmp_path / f"cut{share}.h5ad"
        bad.write_bytes(content[: len(content) // share])
        refused(bad, "cannot be read" if share == 2 else "truncated")


def test_not_an_hdf5_file(refused, tmp_path):
    (tmp_path / "text.h5ad").write_text("gene,cell\n")
    refused(tmp_path / "text.h5ad", "not valid HDF5")
    (tmp_path / "empty.h5ad").touch()
    refused(tmp_path / "empty.h5ad", "is empty")


def test_folder_for_a_file(refused, tmp_path):
    (tmp_path / "folder.h5ad").mkdir()
    refused(tmp_path / "folder.h5ad", "is a folder")


def test_no_cells_and_no_genes(refused, adata, tmp_path):
    refused(written(adata[:0].copy(), tmp_path), "0 cells")
    refused(written(adata[:, :0].copy(), tmp_path), "0 genes")


# the genes


def test_no_genes_in_common(refused, adata, tmp_path):
    adata.var_names = [f"UNKNOWN-{i}" for i in range(adata.n_vars)]
    message = refused(written(adata, tmp_path), "0 of the model's 300 genes")
    assert "UNKNOWN-0" in message and "MS4A1" in message
    # there is nothing to force
    refused(tmp_path / "bad.h5ad", "0 of the model's 300 genes", "--force")


def test_ensembl_ids(refused, run, adata, model_dir, tmp_path):
    symbols = list(adata.var_names)
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    refused(written(adata, tmp_path), "Ensembl")
    # with symbols in a column of var they are used
    adata.var["gene_symbols"] = symbols
    good = written(adata, tmp_path, "good.h5ad")
    assert run("annotate", good, "--model", model_dir, "--output", tmp_path / "out.h5ad")[0] == 0
    assert list(anndata.read_h5ad(tmp_path / "out.h5ad").var_names) == list(adata.var_names)


@pytest.mark.parametrize("change", [str.lower, str.capitalize], ids=["lower-case", "mouse"])
def test_names_of_another_case_are_never_guessed(refused, adata, tmp_path, change):
    adata.var_names = [change(name) for name in adata.var_names]
    assert change("MS4A1") in refused(written(adata, tmp_path), "mouse")


def test_low_overlap_is_refused_and_can_be_forced(refused, run, adata, model_dir, tmp_path):
    few = written(adata[:, :60].copy(), tmp_path)
    refused(few, "60 of the model's 300 genes; at least 90 are needed")
    code, _, err = run("annotate", few, "--model", model_dir, "--output", tmp_path / "out.h5ad", "--force")
    assert code == 0
    assert "60 of the model's 300 genes found (20.0%)" in err


# the values


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinite"), (0.37, "--values")],
    ids=["negative", "NaN", "infinite", "fractional"],
)
def test_one_bad_value(refused, adata, tmp_path, value, message):
    # many of them for the fractions: a stray one is found too, but only in all cells together is it told from log1p
    adata.X.data[-500:] = value
    refused(written(adata, tmp_path), message)


def test_z_scored_values(refused, adata, tmp_path):
    dense = adata.X.toarray()
    adata.X = (dense - dense.mean(0)) / (dense.std(0) + 1e-9)
    adata.layers["counts"] = dense
    message = refused(written(adata, tmp_path), "z-scored")
    assert "--layer" in message


def test_missing_layer(refused, query):
    refused(query, "no layer 'absent'", "--layer", "absent")


# the output


def test_output_exists(refused, run, query, model_dir, tmp_path):
    output = tmp_path / "out.h5ad"
    output.write_bytes(b"precious")
    refused(query, "--overwrite")
    assert output.read_bytes() == b"precious"
    assert run("annotate", query, "--model", model_dir, "--output", output, "--overwrite")[0] == 0
    assert "scbert_cell_type" in anndata.read_h5ad(output).obs


def test_output_is_the_input(refused, query, tmp_path):
    refused(query, "the input itself", "--overwrite", output=query)
    (tmp_path / "link.h5ad").symlink_to(query)
    refused(query, "the input itself", "--overwrite", output=tmp_path / "link.h5ad")


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_outputs_over_each_other_or_the_model(run, query, model_dir, tmp_path, verb):
    before, output = _fingerprint(model_dir), tmp_path / "out.h5ad"
    cases = [
        (output, output, "Two outputs have one name"),
        (output, model_dir / "config.json", "folder of the model"),
        (model_dir / "out.h5ad", tmp_path / "genes.csv", "folder of the model"),
    ]
    for written, genes, words in cases:
        options = ["--output", written, "--genes-report", genes, "--overwrite"]
        code, _, err = run(verb, query, "--model", model_dir, *options)
        assert code == 1 and words in err
    assert _fingerprint(model_dir) == before and not output.exists()


def test_output_folder_missing_or_a_file(refused, query, tmp_path):
    refused(query, "does not exist", output=tmp_path / "absent" / "out.h5ad")
    refused(query, "does not exist", output=query / "out.h5ad")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_not_writable(refused, query, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(query, "not writable", output=locked / "out.h5ad")


# the model


def test_no_model(refused, query, tmp_path):
    refused(query, "no model folder", model=tmp_path / "absent")
    refused(query, "is a file", model=query)
    (tmp_path / "hollow").mkdir()
    refused(query, "no config.json", model=tmp_path / "hollow")
    (tmp_path / "run.partial").mkdir()
    refused(query, "--resume", model=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "no weights"),
        ("gene_panel.txt", "gene_panel.txt is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
        ("config.json", "no config.json"),
    ],
)
def test_incomplete_model(refused, query, model_dir, name, message):
    (model_dir / name).unlink()
    refused(query, message)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer_config.json", "gene_panel.txt"]
)
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_corrupted_model(refused, query, model_dir, name, damage):
    path = model_dir / name
    content = path.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "garbage": b"\x93\xff" + content[::-1], "empty": b""}
    path.write_bytes(damaged[damage])
    refused(query, str(model_dir))


def test_model_of_another_type(refused, query, model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    refused(query, "of type 'bert'")


def test_model_without_cell_types(refused, query, pretrained_dir):
    refused(query, "scbert finetune", model=pretrained_dir)


def _change_weights(model_dir, change):
    weights = load_file(model_dir / "model.safetensors")
    change(weights)
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights(refused, query, model_dir):
    _change_weights(model_dir, lambda weights: weights.pop("classifier.out_proj.weight"))
    refused(query, "lack 1 of the model's tensors (first: classifier.out_proj.weight)")


def test_missing_random_features(refused, query, model_dir):
    _change_weights(model_dir, lambda weights: weights.pop("scbert.layers.0.attention.projection_matrix"))
    refused(query, "projection_matrix")


def test_weights_of_another_shape(refused, query, model_dir):
    def widen(weights):
        weights["classifier.out_proj.weight"] = torch.zeros(3, 9)

    _change_weights(model_dir, widen)
    refused(query, "classifier.out_proj.weight is (3, 9), needed (3, 8)")


def test_weights_that_are_no_numbers(refused, query, model_dir):
    def spoil(weights):
        weights["classifier.out_proj.weight"][0, 0] = float("nan")

    _change_weights(model_dir, spoil)
    refused(query, "NaN")


def test_tokenizer_of_another_model(refused, query, model_dir):
    panel = (model_dir / "gene_panel.txt").read_text().splitlines()
    (model_dir / "gene_panel.txt").write_text("\n".join(panel[:200]))
    refused(query, "belongs to another model: it has 200 genes")


# options


@pytest.mark.parametrize(
    "options", [["--threshold", "1.5"], ["--batch-size", "0"], ["--input", "tpm"], ["--what"]]
)
def test_wrong_usage_is_exit_code_2(run, query, model_dir, tmp_path, options):
    code, _, err = run("annotate", query, "--model", model_dir, "--output", tmp_path / "out.h5ad", *options)
    assert code == 2
    assert "Traceback" not in err
    assert not (tmp_path / "out.h5ad").exists()


def test_majority_vote_of_an_absent_column(refused, query):
    assert "donor" in refused(query, "no column 'cluster'", "--majority-vote", "cluster")


# what looks bad and is not


def test_a_single_cell(run, adata, model_dir, tmp_path):
    single = written(adata[:1].copy(), tmp_path)
    code, out, _ = run("annotate", single, "--model", model_dir, "--output", tmp_path / "out.h5ad", "--json")
    assert code == 0
    assert json.loads(out)["cells"] == 1
    assert anndata.read_h5ad(tmp_path / "out.h5ad").n_obs == 1


def test_every_storage_of_x_gives_the_same(run, adata, query, model_dir, tmp_path):
    def probabilities(path):
        output = tmp_path / f"out-{path.name}"
        assert run("annotate", path, "--model", model_dir, "--output", output)[0] == 0
        annotated, before = anndata.read_h5ad(output), anndata.read_h5ad(path)
        assert type(annotated.X) is type(before.X) and annotated.X.dtype == before.X.dtype
        assert abs(annotated.X - before.X).max() == 0
        return annotated.obsm["scbert_probabilities"]

    expected = probabilities(query)
    dense = adata.X.toarray()
    storages = {
        "csc": sp.csc_matrix(dense),
        "dense": dense,
        "integers": sp.csr_matrix(dense.astype(np.int32)),
        "float64": sp.csr_matrix(dense.astype(np.float64)),
        "dense-int64": dense.astype(np.int64),
    }
    for name, matrix in storages.items():
        adata.X = matrix
        np.testing.assert_array_equal(probabilities(written(adata, tmp_path, f"{name}.h5ad")), expected)


def test_duplicate_genes_are_summed_and_said(run, adata, model_dir, tmp_path):
    names = list(adata.var_names)
    names[299] = names[0]
    adata.var_names = names
    code, _, err = run(
        "annotate", written(adata, tmp_path), "--model", model_dir, "--output", tmp_path / "out.h5ad"
    )
    assert code == 0
    assert "1 repeated column(s) were summed" in err


def test_repeated_cell_names(run, adata, model_dir, tmp_path):
    adata.obs_names = ["cell"] * adata.n_obs
    path = written(adata, tmp_path)
    assert run("annotate", path, "--model", model_dir, "--output", tmp_path / "out.h5ad")[0] == 0
    assert list(anndata.read_h5ad(tmp_path / "out.h5ad").obs_names) == ["cell"] * adata.n_obs


def test_json_is_one_line_on_stdout(run, query, model_dir, tmp_path):
    code, out, err = run("annotate", query, "--model", model_dir, "--output", tmp_path / "out.h5ad", "--json")
    assert code == 0
    assert len(out.splitlines()) == 1
    summary = json.loads(out)
    assert summary["cells"] == 120 and sum(summary["cells_per_label"].values()) == 120
    assert summary["gene_overlap"]["share"] == 1.0
    assert "Loading weights" not in err and "on cpu in float32" in err


def test_embed_refuses_alike(run, query, model_dir, tmp_path):
    output = tmp_path / "out.h5ad"
    shutil.copy(query, output)
    assert run("embed", query, "--model", model_dir, "--output", output)[0] == 1
    assert run("embed", query, "--model", tmp_path / "absent", "--output", tmp_path / "new.h5ad")[0] == 1
    assert run("embed", query, "--model", model_dir, "--output", output, "--overwrite")[0] == 0
    assert anndata.read_h5ad(output).obsm["X_scbert"].shape == (120, 16)
