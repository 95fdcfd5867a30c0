"""The configurations and the SLURM script that ship, as far as a machine without GPUs can try them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import scbert.training.run_pretrain as run_pretrain
from scbert.data.corpus_build import build_corpus
from scbert.modeling_scbert import modeling_scbert

CONFIGS = Path(run_pretrain.__file__).parent / "accelerate"
TYPES = {
    "single_gpu": "NO",
    "ddp": "MULTI_GPU",
    "cpu_2": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
}
MODEL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "num_random_features": 16,
    "intermediate_size": 32, "feature_redraw_interval": 6,
}  # fmt: skip
SETTINGS = {
    "model": json.dumps(MODEL), "use_cpu": True, "learning_rate": 3e-3, "disable_tqdm": True, "logging_steps": 1,
    "eval_strategy": "no", "validation_fraction": 0.2, "dataloader_num_workers": 0,
}  # fmt: skip
FAKES = {
    "srun": 'shift; echo $$ > "$FAKE/srun.pid"; export SLURM_PROCID=0; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$FAKE/scontrol.log"; fi',
    "scancel": 'kill -TERM "$(cat "$FAKE/srun.pid")"',
}


@pytest.fixture
def corpus(adata, tmp_path):
    adata[:, :80].write_h5ad(tmp_path / "cells.h5ad")
    build_corpus([tmp_path / "cells.h5ad"], tmp_path / "corpus", min_genes=0, shard_cells=50)
    return tmp_path / "corpus"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    """Its loader refuses keys it does not know."""
    config = load_config_from_file(str(path))
    assert config.distributed_type == TYPES[path.stem] and config.num_machines == 1
    if path.stem == "fsdp2":
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert config.fsdp_config["fsdp_version"] == 2 and hasattr(modeling_scbert, wrapped)
    if path.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", CONFIGS / "slurm_multi_node.sh"], check=True)


def environment(**more):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def arguments(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
def test_fsdp2_trains_what_one_process_does(corpus, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "fsdp2.yaml"]
    launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    options = {**SETTINGS, "max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    job = arguments(**options, corpus=corpus, output=tmp_path / "two", per_device_train_batch_size=4)
    done = subprocess.run(
        [*map(str, [*launcher, script, *job])], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run_pretrain.pretrain(corpus, tmp_path / "one", **options, per_device_train_batch_size=8)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one | two:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_slurm_job_is_queued_again_and_goes_on(corpus, tmp_path):
    """One machine of two processes; srun, scontrol and scancel are stand-ins."""
    for name, lines in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7"}
    job_environment = environment(**slurm, FAKE=str(tmp_path))
    job_environment["PATH"] = os.pathsep.join([str(tmp_path), job_environment["PATH"]])
    options = arguments(**SETTINGS, max_steps=300, per_device_train_batch_size=4, save_steps=5)
    job = ["bash", CONFIGS / "slurm_multi_node.sh", corpus, tmp_path / "model", *options]
    process = subprocess.Popen([*map(str, job)], env=job_environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "model.partial").glob("checkpoints/*/complete")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n" and not (tmp_path / "model").exists()
    done = subprocess.run([*map(str, job)], env=job_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    training = json.loads((tmp_path / "model" / "metrics.json").read_text())["training"]
    assert training["processes"] == 2 and training["steps"] == 300
