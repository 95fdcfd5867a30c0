"""Whole blocks by the kernels for CUDA, through Triton's interpreter on a CPU; see cuda_layer_interpreted.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from scbert import ScBertConfig
from scbert.modeling_scbert import cuda_layer_scbert
from scbert.modeling_scbert.cuda_layer_scbert import MAX_ERROR, cuda_supports
from scbert.modeling_scbert.layers_scbert import ScBertLayer

SCRIPT = Path(__file__).with_name("cuda_layer_interpreted.py")
FROZEN = ["attention.q_proj.weight", "output.weight", "ffn_norm.bias"]
CASES = [
    {"mask": True, "group": 80, "frozen": FROZEN},
    {"dtype": "bfloat16", "queries": 5, "capability": [9, 0]},
    {"packed": [20, 3, 18]},
]
MORE = [
    {},
    {"queries": 5, "mask": True, "group": 40, "hidden": 200, "capability": [9, 0]},
    {"dtype": "bfloat16", "mask": True},
    {"dtype": "bfloat16", "packed": [5, 40, 1]},
]


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_outputs_gradients_and_training_equal_the_plain_block(cases):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    *found, tried, losses = map(json.loads, result.stdout.splitlines())
    for case, errors in zip(cases, found, strict=True):
        bound = 3e-2 if case.get("dtype") == "bfloat16" else 1e-5
        assert max(errors.values()) < bound, (case, errors)
        assert not set(errors) & set(case.get("frozen", []))
    # what the first block of a size is tried on
    assert tried < MAX_ERROR / 2
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0][2] < losses[0][0]


def layer(**changes):
    return ScBertLayer(ScBertConfig(**{"hidden_size": 32} | changes), 0)


def with_adapter():
    found = layer()
    found.attention.q_proj = nn.Sequential(found.attention.q_proj)
    return found


def with_hook():
    found = layer()
    found.output.register_forward_hook(lambda *_: None)
    return found


@pytest.mark.parametrize(
    ("block", "hidden_states", "reason"),
    [
        (layer(), torch.zeros(1, 5, 32), None),
        (layer(), torch.zeros(0, 5, 32), "empty"),
        (layer(), torch.zeros(1, 5, 32, dtype=torch.float64), "float64"),
        (layer(), torch.zeros(1, 5, 32, dtype=torch.bfloat16), "bfloat16"),
        (layer(hidden_size=256), torch.zeros(1, 5, 256), "hidden size"),
        (layer(hidden_dropout_prob=0.1).train(), torch.zeros(1, 5, 32), "dropout"),
        (layer(hidden_act="relu"), torch.zeros(1, 5, 32), "GELU"),
        (layer(qkv_bias=True), torch.zeros(1, 5, 32), "weights"),
        (with_adapter(), torch.zeros(1, 5, 32), "weights"),
        (with_hook(), torch.zeros(1, 5, 32), "hooks"),
    ],
)
def test_what_is_not_served_is_left_to_other_blocks(block, hidden_states, reason, monkeypatch):
    assert "CUDA" in cuda_supports(block, hidden_states)
    tried_with(monkeypatch, lambda *_: 0.01)
    found = cuda_supports(block, hidden_states)
    assert found is None if reason is None else reason in found


def tried_with(monkeypatch, difference):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cuda_layer_scbert, "_tried", {})
    monkeypatch.setattr(cuda_layer_scbert, "_difference_from_plain", difference)


@pytest.mark.parametrize("outcome", [0.5, float("nan"), RuntimeError("out of resource")])
def test_blocks_whose_trial_fails_are_left_to_others_and_tried_once(outcome, monkeypatch, caplog):
    trials = []

    def difference(*given):
        trials.append(given)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    tried_with(monkeypatch, difference)
    for _ in range(2):
        reason = cuda_supports(layer(), torch.zeros(1, 5, 32))
        assert ("does not run" if isinstance(outcome, Exception) else "relative error") in reason
    assert len(trials) == 1 and reason in caplog.text
    # another kind is tried anew
    cuda_supports(layer(hidden_size=16), torch.zeros(1, 5, 16))
    assert len(trials) == 2


def test_a_full_memory_decides_nothing(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    tried_with(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        cuda_supports(layer(), torch.zeros(1, 5, 32))
    assert not cuda_layer_scbert._tried
