"""The Triton kernels, through Triton's interpreter on a CPU, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# what the interpreter runs: outputs and gradients against the float64 reference, relative to the largest entry
SCRIPT = """
import json, sys, torch
from scbert.modeling_scbert import favor_engine_scbert as engine
from scbert.modeling_scbert.favor_engine_scbert import favor_attention
from scbert.modeling_scbert.favor_scbert import draw_projection, favor_attention_naive

errors = []
for dtype, masked, queries, keys, features in json.loads(sys.argv[1]):
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (
        torch.randn(2, n, 2, width, generator=generator).to(getattr(torch, dtype)).transpose(1, 2).requires_grad_()
        for n, width in ((queries, 16), (keys, 16), (keys, 12))
    )
    mask = torch.rand(2, keys, generator=generator) < 0.6 if masked else None
    if masked == 2:
        mask[1] = False
    projection = draw_projection(features, 16, generator)
    found = favor_attention(q, k, v, projection, mask)
    grad = torch.randn(found.shape, generator=generator)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = favor_attention_naive(*exact, projection.double(), mask)
    found = [found, *torch.autograd.grad(found, (q, k, v), grad.to(found.dtype))]
    wanted = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    errors.append(max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, wanted)))
assert not engine._disabled
print(json.dumps(errors))
"""

CASES = [
    ("float32", 0, 37, 37, 75),
    ("float32", 1, 70, 130, 75),
    ("float32", 2, 20, 33, 16),
    # the interpreter multiplies no bfloat16 and takes float16 for it: the two-halves projection is what is tested
    ("bfloat16", 1, 37, 90, 75),
]


def test_outputs_and_gradients_equal_the_reference():
    torch.manual_seed(0)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "SCBERT_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for case, error in zip(CASES, json.loads(result.stdout), strict=True):
        assert error < (1e-5 if case[0] == "float32" else 2e-2), case
