"""The Triton kernels against the float64 reference, through Triton's interpreter on a CPU."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_interpreted.py")
REAL = {"dim": 64, "width": 64, "features": 266}
HOPPER, OTHERS = [9, 0], [8, 0]
# largest error relative to the largest entry
MAX_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def interpreted(cases):
    """What triton_interpreted.py prints for the cases."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_close(cases):
    for case, found in zip(cases, interpreted(cases), strict=True):
        assert max(found["max"]) < MAX_ERROR[case.get("dtype", "float32")], (case, found)


def test_outputs_and_gradients_equal_the_reference():
    assert_close(
        [
            {},
            {"queries": 70, "keys": 130, "mask": "some", "layout": "joint"},
            {"queries": 20, "keys": 33, "mask": "cell", "features": 16, "layout": "columns"},
            # several parts of the positions, groups of features
            {"keys": 1100, "queries": 9, "processors": 132, "layout": "heads outside"},
            {"dtype": "float16", "mask": "some"},
            {"dtype": "bfloat16", "mask": "cell", "keys": 90},
        ]
    )


def test_the_tiles_of_every_gpu_give_the_same():
    sizes = REAL | {"queries": 70, "keys": 130, "cells": 1, "mask": "some"}
    assert_close(
        [sizes | {"capability": x, "dtype": y} for x in (HOPPER, OTHERS) for y in ("float32", "bfloat16")]
    )


@pytest.mark.parametrize("offset", [0.0, 4.0, 40.0])
def test_bfloat16_gradients_do_not_feel_what_values_share(offset):
    """Rounded with the offset, what tells the rows of the context apart is lost: queries had gradients 50% off."""
    sizes = REAL | {
        "queries": 200,
        "keys": 500,
        "cells": 1,
        "heads": 1,
        "dtype": "bfloat16",
        "offset": offset,
    }
    for found in interpreted([sizes | {"capability": x} for x in (HOPPER, OTHERS)]):
        assert max(found["rms"]) < 0.02


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "reason"),
    [
        ("cuda:1", torch.bfloat16, 64, (8, 0), None),
        ("cuda:1", torch.float16, 128, (12, 0), None),
        ("cuda:1", torch.float64, 64, (9, 0), "float64"),
        ("cuda:1", torch.float32, 129, (9, 0), "wider than 128"),
        # these emulate bfloat16, and have no tensor cores for the kernels
        ("cuda:1", torch.bfloat16, 64, (7, 5), "older than compute capability 8.0"),
        ("cpu", torch.float32, 64, (9, 0), "no CUDA device"),
    ],
)
def test_what_the_kernels_serve(device, dtype, width, capability, reason, monkeypatch):
    from scbert.modeling_scbert import favor_triton_scbert as launcher

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launcher, "capability_of", lambda device: capability)
    with FakeTensorMode():
        query, value = (torch.empty(1, 2, 5, n, dtype=dtype, device=device) for n in (64, width))
        found = launcher.triton_supports(query, value, torch.empty(266, 64))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("empty", ["cells", "queries", "keys"])
def test_empty_batches_launch_nothing(empty):
    from scbert.modeling_scbert import favor_triton_scbert as launcher

    sizes = {"cells": 2, "queries": 5, "keys": 7} | {empty: 0}
    query = torch.randn(sizes["cells"], 3, sizes["queries"], 8)
    key, value = (torch.randn(sizes["cells"], 3, sizes["keys"], n) for n in (8, 4))
    given = (query, key, value, torch.randn(10, 8), None)
    output, *state = launcher.triton_forward(*given, 1e-4)
    assert output.shape == (sizes["cells"], sizes["queries"], 3, 4) and not output.any()
    grads = launcher.triton_backward(output, *given, output, *state, 1e-4)
    assert [x.shape for x in grads] == [x.transpose(1, 2).shape for x in (query, key, value)]
    assert not any(x.any() for x in grads)


def test_tiles_cover_features_of_any_number():
    from scbert.modeling_scbert.favor_tiles_scbert import choose_tiles

    for features in range(1, 700):
        for capability in ((8, 0), (9, 0)):
            for half in (True, False):
                sums, rows = choose_tiles(capability, half, 64, features)
                groups = math.ceil(features / (sum(sums.features) - 1))
                assert groups == 1 or sums == choose_tiles(capability, half, 64, 10_000)[0]
                assert not rows.resident or sum(rows.features) - 16 < features <= sum(rows.features)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_cases_equal_the_reference(seed):
    draw = random.Random(seed)
    choices = {
        "dtype": ["float32", "float32", "bfloat16", "float16"],
        "cells": [2, 3],
        "heads": [1, 2, 3],
        "queries": [1, 2, 17, 63, 64, 65, 130],
        "keys": [7, 16, 63, 64, 65, 129, 200],
        "dim": [1, 3, 8, 16, 17, 32, 33, 64, 128],
        "width": [1, 5, 12, 16, 31, 64, 65],
        "features": [9, 15, 16, 17, 63, 64, 75, 130, 266, 300],
        "mask": [None, "some", "cell"],
        "processors": [1, 8, 132],
        "capability": [OTHERS, HOPPER, [10, 0]],
        "layout": ["heads inside", "heads outside", "columns", "joint"],
        "offset": [0.0, 4.0],
    }
    assert_close([{name: draw.choice(x) for name, x in choices.items()} | {"seed": i} for i in range(15)])
