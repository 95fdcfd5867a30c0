"""gene2vec, pretrain and convert through the command line: the whole way, and clear refusals."""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM

from scbert.commands.cli import main

RECIPE = {
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "num_random_features": 16,
        "intermediate_size": 16,
    },
    "training": {"per_device_train_batch_size": 16, "use_cpu": True, "learning_rate": 0.001},
}


@pytest.fixture
def run(capsys):
    """Function that runs `scbert` in this process and returns exit code, stdout and stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def files(adata, tmp_path):
    """Cells, a gene panel and a recipe in a folder of their own."""
    (tmp_path / "cells").mkdir()
    adata.write_h5ad(tmp_path / "cells" / "cells.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(adata.var_names) + "\n")
    (tmp_path / "tiny.json").write_text(json.dumps(RECIPE))
    return tmp_path


def test_vectors_then_pretraining_then_going_on(run, files):
    vectors = files / "vectors.txt"
    command = ["gene2vec", files / "cells", "--output", vectors, "--size", 16, "--cutoff", 0.3, "--json"]
    code, out, err = run(*command, "--iterations", 2)
    assert code == 0, err
    assert json.loads(out)["size"] == 16 and json.loads(out)["pairs"] > 100
    common = ["--recipe", files / "tiny.json", "--epochs", 2, "--json"]
    code, out, err = run(
        "pretrain", files / "cells", "--output", files / "model", "--gene-vectors", vectors,
        "--genes", files / "genes.txt", *common,
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads(out)
    assert summary["genes"] == 300 and 0 <= summary["masked_accuracy"] <= 1
    assert "Writing model" not in err
    code, out, err = run(
        "pretrain", files / "cells", "--output", files / "more", "--base", files / "model", *common
    )
    assert code == 0, err
    assert json.loads(out)["genes"] == 300
    assert sorted(path.name for path in files.iterdir() if "partial" in path.name) == []


def test_importing_vectors(run, files):
    (files / "foreign.tsv").write_text("CD3D\t1\t2\nLYZ\t3\t4\n")
    code, _, err = run("gene2vec", "--import", files / "foreign.tsv", "--output", files / "own.txt")
    assert code == 0, err
    assert (files / "own.txt").read_text().splitlines()[0] == "2 2"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gene2vec", "cells", "--output", "v.txt", "--cutoff", "0.999"], "--top-pairs"),
        (["gene2vec", "--output", "v.txt"], "either a corpus"),
        (["gene2vec", "cells", "--output", "genes.txt"], "already exists"),
        (["gene2vec", "--import", "genes.txt", "--output", "v.txt"], "genes.txt"),
        (["gene2vec", "absent", "--output", "v.txt"], "No such file"),
        (["pretrain", "cells", "--output", "model", "--recipe", "absent"], "no recipe 'absent'"),
        (["pretrain", "cells", "--output", "cells"], "already exists"),
        (["pretrain", "cells", "--output", "model", "--min-genes", "301"], "min-genes"),
        (["pretrain", "cells", "--output", "model", "--base", "cells"], "no config.json"),
        (["convert", "genes.txt", "--genes", "genes.txt", "--output", "model"], "truncated"),
        (["convert", "absent.pth", "--genes", "genes.txt", "--output", "model"], "No such file"),
    ],
)
def test_refusals(run, files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    code, out, err = run(*arguments)
    assert code == 1 and out == ""
    assert err.count("Error: ") == 1 and message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(path.name for path in files.iterdir()) == before


def test_converted_model_pretrains_on(run, files, tmp_path_factory):
    """A conversion is a base like any other."""
    folder = tmp_path_factory.mktemp("trained")
    code, _, err = run(
        "pretrain",
        files / "cells",
        "--output",
        folder / "model",
        "--recipe",
        files / "tiny.json",
        "--epochs",
        1,
    )
    assert code == 0, err
    state = AutoModelForMaskedLM.from_pretrained(folder / "model").state_dict()
    torch.save({"model_state_dict": _original_names(state)}, folder / "original.pth")
    code, out, err = run(
        "convert",
        folder / "original.pth",
        "--genes",
        files / "genes.txt",
        "--output",
        folder / "back",
        "--json",
    )
    assert code == 0, err
    back = AutoModelForMaskedLM.from_pretrained(folder / "back").state_dict()
    assert json.loads(out)["layers"] == 1
    assert all(torch.equal(back[name], state[name]) for name in state)


def _original_names(state):
    from scbert.modeling_scbert.convert_checkpoint import BODY_NAMES, LAYER_NAMES, PRETRAINED_HEAD_NAMES

    names = {**BODY_NAMES, **PRETRAINED_HEAD_NAMES}
    names |= {f"performer.net.layers.0.{old}": f"scbert.layers.0.{new}" for old, new in LAYER_NAMES.items()}
    originals = {new: old for old, new in names.items()}
    return {
        f"{originals[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value
        for name, value in state.items()
    }
