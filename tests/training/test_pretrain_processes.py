"""Several processes train what one does, and survive what kills one of them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoModel

import scbert.training.run_pretrain as run_pretrain
from scbert.data.corpus_build import build_corpus

CONFIG = os.path.join(os.path.dirname(run_pretrain.__file__), "accelerate", "cpu_2.yaml")
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_random_features": 16,
    "intermediate_size": 32,
    "feature_redraw_interval": 6,
}
SETTINGS = {
    "model": json.dumps(MODEL),
    "max_steps": 20,
    "use_cpu": True,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "logging_steps": 1,
    "eval_strategy": "no",
    "validation_fraction": 0.2,
}


@pytest.fixture
def corpus(adata, tmp_path):
    adata[:, :80].write_h5ad(tmp_path / "cells.h5ad")
    build_corpus([tmp_path / "cells.h5ad"], tmp_path / "corpus", min_genes=0, shard_cells=50)
    return tmp_path / "corpus"


def launch(corpus, output, **options):
    """`accelerate launch` of two processes, begun."""
    settings = {**SETTINGS, "corpus": corpus, "output": output, **options}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", "0"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "scbert.training.run_pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finished(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def losses(folder):
    history = json.loads((folder / "metrics.json").read_text())["training"]["history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def test_two_processes_train_what_one_does(corpus, tmp_path):
    """20 steps with the same global batch; the random features are redrawn three times."""
    process = launch(corpus, tmp_path / "two", per_device_train_batch_size=4)
    run_pretrain.pretrain(corpus, tmp_path / "one", **SETTINGS, per_device_train_batch_size=8)
    finished(process)
    summary = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert summary["training"]["processes"] == 2 and summary["training"]["steps"] == 20
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert torch.equal(
        one["layers.0.attention.projection_matrix"], two["layers.0.attention.projection_matrix"]
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        list(losses(tmp_path / "one").values()), list(losses(tmp_path / "two").values()), atol=1e-4
    )


def ranks_of(launcher):
    """Process ids of the training processes below a launcher."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, args in rows if int(parent) == launcher.pid and "run_pretrain" in args]


def wait_for(checkpoint, process):
    deadline = time.monotonic() + 120
    while not (checkpoint / "complete").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_lost_a_process_goes_on_with_the_same_losses(corpus, tmp_path, kind):
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "streaming": True,
        "max_steps": 400, "save_strategy": "steps", "save_steps": 5,
    }  # fmt: skip
    finished(launch(corpus, tmp_path / "whole", **options))
    process = launch(corpus, tmp_path / "model", **options)
    checkpoints = tmp_path / "model.partial" / "checkpoints"
    wait_for(checkpoints / "checkpoint-5", process)
    # the second process is killed; or the whole job is asked to end, as by a scheduler
    os.kill(ranks_of(process)[1] if kind == signal.SIGKILL else process.pid, kind)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "model").exists()
    assert ("SIGKILL" if kind == signal.SIGKILL else "SIGTERM") in output
    saved = [int(path.parent.name.rpartition("-")[2]) for path in checkpoints.glob("*/complete")]
    assert saved and len(saved) <= 2 and max(saved) < 400
    if kind == signal.SIGTERM:
        assert "(--resume) goes on from there" in output
    finished(launch(corpus, tmp_path / "model", resume=True, **options))
    assert losses(tmp_path / "model") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
