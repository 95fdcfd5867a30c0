"""
The Triton kernels on a CPU: errors against the float64 reference, one line of JSON a case.

    TRITON_INTERPRET=1 python tests/modeling_scbert/triton_interpreted.py '[{"dtype": "bfloat16", "keys": 130}]'

A process of its own: the interpreter is chosen when the kernels are defined. It knows no products of bfloat16, so it is
taught them as a GPU computes them, from rounded operands with float32 sums.
"""

import json
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from scbert.modeling_scbert import favor_triton_scbert as launcher
from scbert.modeling_scbert.favor_scbert import draw_projection, favor_attention_naive

SIZES = {"cells": 2, "heads": 2, "queries": 37, "keys": 37, "dim": 16, "width": 12, "features": 75}
# mask: how many of the keys are kept; "cell" also leaves the last cell without any
DEFAULTS = {
    "dtype": "float32",
    "mask": None,
    "seed": 0,
    "scale": 1.0,
    "offset": 0.0,
    "layout": "heads inside",
}
# the GPU whose tiles are taken, and how many multiprocessors it is taken to have
GPU = {"capability": [8, 0], "processors": 1}


def widened(bits: np.ndarray) -> np.ndarray:
    """Bfloat16, which numpy holds as integers, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest bfloat16, as integers."""
    x = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).bfloat16()
    return x.view(torch.int16).numpy().view(np.uint16)


def teach_bfloat16() -> None:
    """Products and conversions of bfloat16 for the interpreter."""
    builder = interpreter.InterpreterBuilder
    plain = builder.cast_impl

    def dot(self, a, b, d, *_):
        x, y = (widened(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
        return interpreter.TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(rounded(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(src.data), tl.float32)
        return plain(self, src, dst_type)

    builder.create_dot = dot
    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast)


def drawn(shape, layout: str, generator) -> torch.Tensor:
    """A tensor [cells, heads, length, width] of a memory layout."""
    cells, heads, length, width = shape
    x = torch.randn(cells, length, heads, width, generator=generator)
    if layout == "heads inside":
        return x.transpose(1, 2)
    if layout == "heads outside":
        return x.transpose(1, 2).contiguous()
    if layout == "columns":
        return x.permute(0, 2, 3, 1).contiguous().mT
    # one of three beside each other, as a joint projection of queries, keys and values leaves them
    return torch.stack([x, x, x], 2)[:, :, 1].transpose(1, 2)


def errors(case: dict) -> dict:
    """Largest error of output and gradients relative to the largest entry, and the gradients' rms error."""
    case = SIZES | DEFAULTS | GPU | case
    launcher.capability_of = lambda device: tuple(case["capability"])
    launcher.processors_of = lambda device: case["processors"]
    generator = torch.Generator().manual_seed(case["seed"])
    cells, heads, dtype = case["cells"], case["heads"], getattr(torch, case["dtype"])
    sizes = ((case["queries"], case["dim"]), (case["keys"], case["dim"]), (case["keys"], case["width"]))
    q, k, v = (drawn((cells, heads, *size), case["layout"], generator) for size in sizes)
    q, k, v = (x.to(dtype) for x in (q * case["scale"], k * case["scale"], v + case["offset"]))
    mask = None
    if case["mask"] is not None:
        mask = torch.rand(cells, case["keys"], generator=generator) < 0.6
        mask[-1] &= case["mask"] != "cell"
    projection = draw_projection(case["features"], case["dim"], generator)
    grad = torch.randn(cells, case["queries"], heads, case["width"], generator=generator).to(dtype)
    output, *state = launcher.triton_forward(q, k, v, projection, mask, 1e-4)
    grads = launcher.triton_backward(grad, q, k, v, projection, mask, output, *state, 1e-4)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = favor_attention_naive(*exact, projection.double(), mask)
    found = [x.transpose(1, 2).double() for x in (output, *grads)]
    wanted = [wanted, *torch.autograd.grad(wanted, exact, grad.transpose(1, 2).double())]
    pairs = list(zip(found, wanted, strict=True))
    return {
        "max": [float((x - y).abs().max() / y.abs().max()) for x, y in pairs],
        "rms": [float((x - y).norm() / y.norm()) for x, y in pairs[1:]],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    teach_bfloat16()
    for case in json.loads(sys.argv[1]):
        print(json.dumps(errors(case)), flush=True)
