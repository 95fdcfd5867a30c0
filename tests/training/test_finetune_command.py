"""`scbert finetune`: bad input is one paragraph and exit code 1, and nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertTokenizer
from scbert.commands.cli import main
from scbert.training import run_finetune


@pytest.fixture
def command(reference, tiny_recipe, tmp_path, capsys):
    """Run `scbert finetune` in this process; returns exit code, stdout and stderr."""

    def run(*arguments, file=reference, label_key="cell_type", output=tmp_path / "model"):
        fixed = [file, "--label-key", label_key, "--output", output, "--recipe", tiny_recipe]
        code = main(["finetune", *map(str, fixed), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def one_paragraph(err):
    """The message alone: no traceback, no report of transformers."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert sum(line.startswith("Error:") for line in lines) == 1
    assert "Traceback" not in err
    return " ".join(lines)


def refused(result, tmp_path, *words):
    """Exit code 1, the words in the message, and no output or partial folder."""
    code, out, err = result
    message = one_paragraph(err)
    assert code == 1
    assert out == ""
    for word in words:
        assert word in message
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.partial").exists()


def relabelled(adata, tmp_path, labels):
    adata.obs["kind"] = labels
    adata.write_h5ad(tmp_path / "labels.h5ad")
    return {"file": tmp_path / "labels.h5ad", "label_key": "kind"}


def test_it_works_and_says_so_in_json(command, tmp_path):
    code, out, _ = command("--json", "--epochs", "2", "--seed", "3")
    assert code == 0
    summary = json.loads(out)
    assert summary["cells"]["test"] == 24
    assert summary["settings"]["seed"] == 3
    assert summary["training"]["epochs"] == 2
    assert (tmp_path / "model" / "metrics.json").is_file()


def test_no_label_column(command, tmp_path):
    refused(command(label_key="celltype"), tmp_path, "'celltype'", "cell_type, donor, batch")


def test_constant_labels(command, adata, tmp_path):
    refused(command(**relabelled(adata, tmp_path, ["B"] * 120)), tmp_path, "only 'B'", "two classes")


def test_measurements_as_labels(command, adata, tmp_path):
    given = relabelled(adata, tmp_path, np.linspace(0, 1, 120))
    refused(command(**given), tmp_path, "measurements, not cell types")


def test_no_labels_at_all(command, adata, tmp_path):
    given = relabelled(adata, tmp_path, [None, "unassigned", ""] * 40)
    refused(command(**given), tmp_path, "120 of 120 cells have no label")


def test_labels_that_are_kept_as_they_are(command, adata, tmp_path):
    """Slashes, unicode, very long names, whole numbers and a class of one cell; missing and reserved ones left out."""
    names = ["CD8+/CD45RA+ T", "单核细胞 🧬", "B" * 300, "7"]
    labels = [names[i % 4] for i in range(115)] + [None, "unassigned", "", "once", "unassigned"]
    code, out, _ = command("--json", **relabelled(adata, tmp_path, labels))
    assert code == 0
    summary = json.loads(out)
    names = sorted([*names, "once"])
    assert summary["classes"] == names
    assert summary["data"]["small_classes"] == {"once": 1}
    assert summary["data"]["unlabelled"] == 4
    assert sum(summary["cells"].values()) == 116
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == names


def test_numeric_classes(command, adata, tmp_path):
    numbers = [float(i % 3) for i in range(119)] + [np.nan]
    code, out, _ = command("--json", **relabelled(adata, tmp_path, numbers))
    assert code == 0
    assert json.loads(out)["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize("content", [b"", b"no h5ad", "half"])
def test_a_damaged_reference(command, reference, tmp_path, content):
    whole = reference.read_bytes()
    (tmp_path / "bad.h5ad").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    refused(command(file=tmp_path / "bad.h5ad"), tmp_path, "bad.h5ad")


def test_no_reference(command, tmp_path):
    refused(command(file=tmp_path / "none.h5ad"), tmp_path, "none.h5ad")


def test_negative_values(command, adata, tmp_path):
    adata.X = adata.X.toarray() - 1
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    refused(command(file=tmp_path / "scaled.h5ad"), tmp_path, "negative")


def test_a_panel_of_other_genes(command, tmp_path):
    (tmp_path / "mouse.txt").write_text("Cd3e\nCd19\nLyz2\n")
    refused(command("--genes", tmp_path / "mouse.txt"), tmp_path, "0 of the model's 3 genes")


def test_an_existing_output(command, tmp_path):
    assert command("--epochs", "1")[0] == 0
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    code, _, err = command("--epochs", "1", "--seed", "5")
    assert code == 1
    assert "--overwrite" in one_paragraph(err)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert command("--epochs", "1", "--seed", "5", "--overwrite")[0] == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before


def test_outputs_that_cannot_be(command, reference, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    code, _, err = command("--overwrite", output=folder)
    assert code == 1
    assert "holds other files" in one_paragraph(err)
    assert (folder / "thesis.tex").is_file()
    for output, words in ((reference, "is a file or a link"), (tmp_path / "no" / "model", "does not exist")):
        code, _, err = command("--overwrite", output=output)
        assert code == 1
        assert words in one_paragraph(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_is_not_writable(command, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, _, err = command(output=locked / "model")
    assert code == 1
    assert "not writable" in one_paragraph(err)


def test_settings_that_do_not_exist(command, tmp_path):
    refused(command("--recipe", "smal"), tmp_path, "no recipe 'smal'", "default")
    (tmp_path / "odd.json").write_text('{"training": {"learningrate": 1}, "model": {}}')
    refused(command("--recipe", tmp_path / "odd.json"), tmp_path, "learningrate")
    (tmp_path / "odd.json").write_text('{"model": {"hidden_size": -3}}')
    refused(command("--recipe", tmp_path / "odd.json"), tmp_path, "hidden_size")
    (tmp_path / "odd.json").write_text('{"model": {"hiddensize": 3}}')
    refused(command("--recipe", tmp_path / "odd.json"), tmp_path, "hiddensize")


@pytest.fixture
def base(gene_panel, tmp_path):
    """A pretrained model of two blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {
        "intermediate_size": 16,
        "num_random_features": 16,
        "max_position_embeddings": len(gene_panel) + 1,
    }
    folder = tmp_path / "base"
    ScBertForMaskedExpression(ScBertConfig(**sizes)).save_pretrained(folder)
    ScBertTokenizer(gene_panel=gene_panel).save_pretrained(folder)
    return folder


def spoil_config(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["scbert.layers.1.output.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no folder": (shutil.rmtree, "base"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "incomplete"),
    "no panel": (lambda folder: (folder / "gene_panel.txt").unlink(), "incomplete"),
    "another type": (lambda folder: spoil_config(folder, model_type="bert"), "'bert'"),
    "damaged config": (lambda folder: cut_short(folder / "config.json"), "damaged"),
    "damaged weights": (
        lambda folder: cut_short(folder / "model.safetensors"),
        "model.safetensors are damaged",
    ),
    "a weight missing": (drop_a_weight, "layers.1.output.weight"),
    "another size": (lambda folder: spoil_config(folder, intermediate_size=32), "do not have the shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_that_is_not_whole(command, base, tmp_path, damage):
    spoil, words = DAMAGES[damage]
    spoil(base)
    refused(command("--base", base), tmp_path, words)


def test_a_base_with_other_genes(command, base, tmp_path):
    (base / "gene_panel.txt").write_text("\n".join(f"GENE{i}" for i in range(300)))
    refused(command("--base", base), tmp_path, "0 of the model's 300 genes")


def test_a_base_that_ships_is_found_by_its_name(command, tmp_path):
    refused(command("--base", "scbert-mini"), tmp_path, "of the model's 12675 genes")


def test_the_module_reads_a_recipe_and_flags(reference, tiny_recipe, tmp_path, monkeypatch, capsys):
    content = json.loads(tiny_recipe.read_text())
    content["data"] = {
        "reference": str(reference),
        "label_key": "cell_type",
        "output": str(tmp_path / "model"),
    }
    tiny_recipe.write_text(json.dumps(content))
    flags = ["--num_train_epochs", "1", "--tokenizer", '{"n_bins": 7}', "--train_all", "True"]
    monkeypatch.setattr(sys, "argv", ["run_finetune", str(tiny_recipe), *flags])
    assert run_finetune.main() == 0
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == metrics["test_accuracy"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vocab_size"] == 9
    monkeypatch.setattr(sys, "argv", ["run_finetune", str(tiny_recipe)])
    assert run_finetune.main() == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_by_a_signal_then_the_same_command(reference, tiny_recipe, tmp_path, number, command):
    content = json.loads(tiny_recipe.read_text())
    content["training"] |= {"num_train_epochs": 60, "learning_rate": 1e-4, "early_stopping_patience": 0}
    tiny_recipe.write_text(json.dumps(content))
    output, partial = tmp_path / "model", tmp_path / "model.partial"
    arguments = [reference, "--label-key", "cell_type", "--output", output, "--recipe", tiny_recipe]
    process = subprocess.Popen(
        [sys.executable, "-m", "scbert", "finetune", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(list(partial.glob("checkpoints/*/complete"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert "Traceback" not in err
    assert not output.exists()
    assert partial.is_dir()
    reached = max(int(path.parent.name.split("-")[1]) for path in partial.glob("checkpoints/*/complete"))
    code, out, _ = command("--resume", "--json")
    assert code == 0
    assert json.loads(out)["training"]["steps"] > reached
    assert output.is_dir()
    assert not partial.exists()


@pytest.mark.slow
def test_two_processes_learn_as_one_does(adata, tiny_recipe, tmp_path):
    """Half the cells per process and step: the same steps as one process with twice the batch."""
    # whole batches: processes fill an incomplete one with cells from the start
    adata.obs["split"] = ["train"] * 80 + ["validation"] * 16 + ["test"] * 24
    reference = tmp_path / "reference.h5ad"
    adata.write_h5ad(reference)
    one, two = tmp_path / "one", tmp_path / "two"
    shared = [str(tiny_recipe), "--reference", str(reference), "--label_key", "cell_type", "--seed", "1"]
    shared += ["--test_key", "split", "--class_balance", "weights", "--num_train_epochs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    module = ["-m", "scbert.training.run_finetune"]
    alone = [sys.executable, *module, *shared, "--output", str(one), "--per_device_train_batch_size", "16"]
    subprocess.run(alone, check=True, env=environment, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    pair = [*launch, *module, *shared, "--output", str(two), "--per_device_train_batch_size", "8"]
    subprocess.run(pair, check=True, env=environment, timeout=300)
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-3, msg=name)
    summary = json.loads((two / "metrics.json").read_text())
    assert summary["training"]["processes"] == 2
    assert summary["test"]["cells"] == 24
