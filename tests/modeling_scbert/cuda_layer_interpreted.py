"""
Blocks by the kernels for CUDA, on a CPU: errors against plain blocks in float64, one line of JSON a case.

    TRITON_INTERPRET=1 python tests/modeling_scbert/cuda_layer_interpreted.py '[{"mask": true, "group": 80}]'

Like triton_interpreted.py, a process of its own. The last lines are about what a block is first tried with, and about a
model that takes three steps of training.
"""

import json
import sys

import torch
from triton_interpreted import teach_bfloat16

from scbert.modeling_scbert import (
    ScBertConfig,
    ScBertForMaskedExpression,
    cuda_layer_scbert,
    cuda_steps_scbert,
)
from scbert.modeling_scbert import favor_triton_scbert as launcher
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.blocks_scbert import choose_block, run_block
from scbert.modeling_scbert.layers_scbert import ScBertLayer

SIZES = {"hidden": 40, "heads": 2, "dim": 16, "inner": 72, "cells": 3, "length": 37}
# queries: at how many rows alone the output is wanted; packed: lengths of cells in one row; group: tokens that are
# computed at once
DEFAULTS = {
    "dtype": "float32",
    "mask": False,
    "queries": None,
    "packed": None,
    "group": 1 << 16,
    "capability": [8, 0],
    "frozen": [],
}


def build(case: dict) -> tuple[ScBertLayer, ScBertLayer]:
    """A block with weights that matter, and its twin in float64."""
    config = ScBertConfig(
        hidden_size=case["hidden"],
        num_attention_heads=case["heads"],
        head_dim=case["dim"],
        intermediate_size=case["inner"],
        num_random_features=30,
    )
    layers = ScBertLayer(config, 0), ScBertLayer(config, 0).double()
    for name, weight in layers[0].named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.1)
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        for name, weight in layer.named_parameters():
            weight.requires_grad_(name not in case["frozen"])
    return layers


def errors(case: dict) -> dict[str, float]:
    """Error of the output and of every gradient, relative to the largest entry."""
    case = SIZES | DEFAULTS | case
    torch.manual_seed(0)
    launcher.capability_of = cuda_steps_scbert.capability_of = lambda device: tuple(case["capability"])
    cuda_layer_scbert.GROUP_TOKENS = case["group"]
    layer, exact = build(case)
    inputs = {"hidden_states": torch.randn(case["cells"], case["length"], case["hidden"])}
    keep = None
    if case["mask"]:
        keep = torch.rand(case["cells"], case["length"]) < 0.7
        keep[-1] = False
    if case["packed"]:
        inputs["hidden_states"] = torch.randn(1, sum(case["packed"]), case["hidden"])
        keep = torch.tensor([0, *case["packed"]]).cumsum(0)
    if case["queries"]:
        inputs["queries"] = torch.randn(case["cells"], case["queries"], case["hidden"])
    results = []
    for block, kind in ((layer, torch.float32), (exact, torch.float64)):
        given = {name: x.to(kind).requires_grad_() for name, x in inputs.items()}
        rows = given["hidden_states"], keep, given.get("queries")
        half = case["dtype"] == "bfloat16" and block is layer
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=half),
            favor_backend(*["naive"] * (block is exact)),
        ):
            assert choose_block(block, rows[0]) == ("cuda" if block is layer else "plain")
            output = run_block("cuda" if block is layer else "plain", block, *rows)
        given |= {name: weight for name, weight in block.named_parameters() if weight.requires_grad}
        torch.manual_seed(1)
        grads = torch.autograd.grad(output, given.values(), torch.randn(output.shape).to(output.dtype))
        results.append({"output": output.detach()} | dict(zip(given, grads, strict=True)))
    found, wanted = results
    return {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items()}


def trial() -> float:
    """What a block of the published width is first tried with, by its training."""
    config = ScBertConfig(num_attention_heads=2)
    rows = torch.zeros(1, 1, config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        return cuda_layer_scbert._difference_from_plain(ScBertLayer(config, 0), rows, trained=True)


def training_losses(backend: str) -> list[float]:
    """Losses of three steps of masked expression modelling under bfloat16 autocast."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    config = ScBertConfig(**sizes, num_random_features=30, max_position_embeddings=50, sparse_prediction=True)
    model = ScBertForMaskedExpression(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bins = torch.randint(0, 6, (4, 50), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.rand(4, 50, generator=torch.Generator().manual_seed(2)) < 0.3, bins, -100)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with favor_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = model(bins.masked_fill(labels >= 0, config.mask_token_id), labels=labels).loss
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    teach_bfloat16()
    # bfloat16 is not for the interpreter but in this script
    launcher.INTERPRETED = (torch.float32, torch.bfloat16)
    for case in json.loads(sys.argv[1]):
        print(json.dumps(errors(case)), flush=True)
    launcher.capability_of = cuda_steps_scbert.capability_of = lambda device: (8, 0)
    print(json.dumps(trial()), flush=True)
    print(json.dumps([training_losses("cuda"), training_losses("plain")]))
