"""Where and in which precision a job runs: chosen by itself, said, and refused where there is no such thing."""

import anndata
import pytest
import torch

from scbert.commands.cli import main
from scbert.tokenization import InputError
from scbert.trained_model import model_folder
from scbert.trained_model.model_folder import load_model
from scbert.training.finetune_arguments import FINETUNE
from scbert.training.settings import device_settings, parse


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_the_command_says_what_it_picked(verb, query, model_dir, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    arguments = [verb, str(query), "--model", str(model_dir), "--output", str(output)]
    assert main([*arguments, "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "on cpu in bfloat16" in capsys.readouterr().err
    about = anndata.read_h5ad(output).uns["scbert" if verb == "annotate" else "scbert_embedding"]
    assert about["dtype"] == "bfloat16"


def test_a_backend_that_is_none_is_an_error_in_one_line(query, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SCBERT_BACKEND", "fast")
    arguments = ["annotate", str(query), "--model", str(model_dir), "--output", str(tmp_path / "out.h5ad")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "SCBERT_BACKEND names fast; known are" in said and "Traceback" not in said
    assert not (tmp_path / "out.h5ad").exists()


def test_auto_is_the_default(model_dir):
    chosen, default = load_model(model_dir, device="auto", dtype="auto"), load_model(model_dir)
    assert (chosen.device, chosen.dtype) == (default.device, default.dtype)


def test_what_is_not_there_is_refused(model_dir):
    with pytest.raises(InputError, match="no device 'abacus'"):
        load_model(model_dir, device="abacus")
    with pytest.raises(InputError, match="CUDA GPU"):
        load_model(model_dir, device=f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        device_settings("cuda:1")
    with pytest.raises(InputError, match="auto, float32 or bfloat16"):
        device_settings(dtype="float16")


def test_training_takes_the_same_two_options():
    given = {"reference": "a.h5ad", "label_key": "type", "output": "model", "device": "cpu"}
    _, _, _, training = parse(FINETUNE, given | {"dtype": "bfloat16"})
    assert training.device.type == "cpu" and training.bf16
    assert not parse(FINETUNE, given | {"dtype": "float32"})[-1].bf16
    assert parse(FINETUNE, given | {"device": None, "dtype": "bfloat16"})[-1].bf16


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_gpus_that_emulate_bfloat16_compute_in_float32(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert model_folder._pick_dtype(torch.device("cuda"), "auto") == dtype
