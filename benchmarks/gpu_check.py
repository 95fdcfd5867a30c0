"""
The Triton kernels on a CUDA machine: right first, then how fast and in how much memory.

    python benchmarks/gpu_check.py --output benchmarks/results/gpu_check.json

Errors of attention against the naive reference in float64, outputs and gradients, at small and at full size, also
where all values share an offset; of a whole block; of the losses of some training steps. Then cells per second and peak
memory of inference and of pretraining steps in bfloat16 at several batch sizes: ours, exact attention by torch's fused
kernel, and the operations of the Performer library; and inference captured in a CUDA graph. Every figure is printed as
soon as it is known, and a part that fails is one of the findings. Exit code 1 where an error is above its bound or no
number, a part of the check failed, or other engines had to step in.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from performer_attention import performer_attention
from scbert.modeling_scbert import ScBertConfig, ScBertForMaskedExpression
from scbert.modeling_scbert import favor_engine_scbert as engine
from scbert.modeling_scbert.backends_scbert import Backend, favor_backend
from scbert.modeling_scbert.blocks_scbert import choose_block, run_block, run_plain
from scbert.modeling_scbert.favor_engine_scbert import FAVOR, favor_attention
from scbert.modeling_scbert.favor_scbert import draw_projection, favor_attention_naive
from scbert.modeling_scbert.layers_scbert import ScBertLayer

DEVICE = "cuda"
# largest error of output and gradients, relative to the largest entry; in bfloat16, of gradients the rms error
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
# of a block under autocast, whose projections are rounded as well; of losses
BLOCK_BOUND, LOSS_BOUND = 5e-2, 1e-2
# cells, heads, queries, keys, head size, value width, features, masked, offset of the values
CASES = [
    (2, 2, 37, 37, 16, 12, 75, False, 0),
    (2, 3, 70, 130, 64, 64, 266, True, 0),
    (1, 2, 1000, 513, 64, 64, 266, False, 4),
    (2, 2, 300, 300, 64, 64, 266, True, 40),
    (3, 1, 65, 64, 32, 128, 128, True, 0),
    (2, 2, 200, 200, 128, 128, 266, False, 4),
    (2, 10, 4_000, 4_000, 64, 64, 266, True, 0),
    (1, 10, 16_907, 16_907, 64, 64, 266, False, 4),
]
GOALS = {"inference, cells/s": 1000, "pretraining, cells/s": 300, "GiB at batch 32": 4}
CHECKS = ("attention", "block", "losses")


def main() -> int:
    """Check, measure, print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=16_907)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("No CUDA device.", file=sys.stderr)
        return 1
    results = {"device": describe_device(), "found": []}
    print(results["device"], flush=True)
    for part in parts(arguments):
        results["found"].append(part())
        print(show(results["found"][-1]), flush=True)
        if arguments.output:
            # after every part: a later one may end the process
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"goals: {GOALS}")
    disabled = [str(kind) for kind in engine._disabled]
    if disabled:
        print(f"The portable engine stepped in for {', '.join(disabled)}.")
    return int(bool(disabled) or any(map(is_bad, results["found"])))


def parts(arguments: argparse.Namespace):
    """What is checked and measured, in turn."""
    sizes = (arguments.length, arguments.layers, arguments.repeats)
    for case in CASES:
        for dtype in BOUNDS:
            yield part("attention", check_attention, dtype, *case)
    for masked in (False, True):
        yield part("block", check_block, masked)
    yield part("losses", check_losses)
    for job in JOBS:
        for batch in arguments.batches:
            for way in WAYS:
                yield part("speed", measure_speed, job, way, batch, *sizes)
    yield part("speed", measure_graph, 1, *sizes)


def part(kind: str, function: Callable[..., dict], *given) -> Callable[[], dict]:
    """Runs a function; what it finds, or how it failed."""

    def run() -> dict:
        found = {"kind": kind, "of": ", ".join(map(str, given))}
        torch.cuda.empty_cache()
        try:
            return found | function(*given)
        except Exception as error:
            # a part that does not fit or compile is a finding, and the others are still to come
            return found | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}

    return run


def describe_device() -> dict:
    """The GPU, and the versions that matter."""
    import transformers
    import triton

    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "processors": properties.multi_processor_count, **versions}


# ---- right ----------------------------------------------------------------------------------------------------------


def is_bad(found: dict) -> bool:
    """Whether a check failed or has an error that is not within its bound; no number is within none."""
    if found["kind"] not in CHECKS:
        return False
    return "failed" in found or not all(error <= found["bound"] for error in found["errors"].values())


def relative_errors(found, wanted, rms: bool) -> dict[str, float]:
    """Of output and gradients, by name; of gradients the rms error where that is asked for."""
    errors = {}
    for name, x, y in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        off = x.double() - y
        largest = off.abs().max() / y.abs().max()
        errors[name] = (off.norm() / y.norm() if rms and name != "output" else largest).item()
    return errors


def check_attention(dtype, cells, heads, queries, keys, dim, width, features, masked, offset) -> dict:
    """Errors of the kernels' output and the three gradients."""
    torch.manual_seed(0)
    shapes = ((queries, dim, 0), (keys, dim, 0), (keys, width, offset))
    tensors = [
        (torch.randn(cells, n, heads, w, device=DEVICE) + mean)
        .to(getattr(torch, dtype))
        .transpose(1, 2)
        .requires_grad_()
        for n, w, mean in shapes
    ]
    projection = draw_projection(features, dim, torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.rand(cells, keys, device=DEVICE) < 0.6 if masked else None
    with favor_backend("triton"):
        output = favor_attention(*tensors, projection, mask)
        grad = torch.randn(output.shape, device=DEVICE).to(output.dtype)
        found = [output, *torch.autograd.grad(output, tensors, grad)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = favor_attention_naive(*exact, projection.double(), mask)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    errors = relative_errors(found, wanted, dtype == "bfloat16")
    return {"errors": errors, "bound": BOUNDS[dtype]}


def check_block(masked: bool) -> dict:
    """Errors of a block of the published size under autocast, against the plain block in float64."""
    torch.manual_seed(0)
    layer = ScBertLayer(ScBertConfig(), 0).to(DEVICE)
    exact = ScBertLayer(ScBertConfig(), 0).to(DEVICE).double()
    exact.load_state_dict(layer.state_dict())
    rows = torch.randn(2, 1000, 200, device=DEVICE, requires_grad=True)
    mask = torch.rand(2, 1000, device=DEVICE) < 0.6 if masked else None
    with torch.autocast(DEVICE, torch.bfloat16):
        name = choose_block(layer, rows)
        output = run_block(name, layer, rows, mask)
    with favor_backend("naive"):
        double = rows.detach().double().requires_grad_()
        wanted = run_plain(exact, double, mask)
    grad = torch.randn_like(output)
    (found,), (gradient,) = (
        torch.autograd.grad(x, y, grad.to(x.dtype)) for x, y in ((output, rows), (wanted, double))
    )
    errors = {
        "output": ((output - wanted).abs().max() / wanted.abs().max()).item(),
        "input": ((found - gradient).norm() / gradient.norm()).item(),
    }
    # another block than the kernels' is as wrong as no number
    errors["chosen"] = 0.0 if name == "cuda" else float("inf")
    return {"errors": errors, "bound": BLOCK_BOUND}


def check_losses() -> dict:
    """Losses of some pretraining steps in bfloat16, beside those of the portable engine."""
    losses = []
    for names in ((), ("plain", "chunked")):
        model, batch = build(4, 1000, 2)
        with favor_backend(*names):
            run = pretraining(model, batch)
            losses.append([run() for _ in range(5)])
    pairs = zip(*losses, strict=True)
    errors = {f"step {i}": abs(ours / theirs - 1) for i, (ours, theirs) in enumerate(pairs)}
    return {"errors": errors, "bound": LOSS_BOUND}


# ---- fast -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def performer():
    """Attention in the separate operations of the Performer library, everything kept."""
    naive, FAVOR["naive"] = FAVOR["naive"], Backend(lambda *_: None, performer_attention)
    try:
        with favor_backend("naive"):
            yield
    finally:
        FAVOR["naive"] = naive


# attention type, and the backends to run with
WAYS = {
    "ours": ("favor", favor_backend),
    "kernels of attention alone": ("favor", lambda: favor_backend("plain", "triton")),
    "portable engine": ("favor", lambda: favor_backend("-cuda", "-triton")),
    "exact attention (SDPA)": ("softmax", favor_backend),
    "Performer library's operations": ("favor", performer),
}


def build(batch: int, length: int, layers: int, attention: str = "favor"):
    """The published model and a batch of masked cells, on the GPU."""
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": length, "num_hidden_layers": layers}
    config = ScBertConfig(**sizes, attention_type=attention, sparse_prediction=True)
    model = ScBertForMaskedExpression(config).to(DEVICE)
    input_ids = torch.randint(1, 6, (batch, length), device=DEVICE)
    input_ids = input_ids * (torch.rand(batch, length, device=DEVICE) < 0.1)
    chosen = (input_ids > 0) & (torch.rand(batch, length, device=DEVICE) < 0.15)
    return model, {"input_ids": input_ids, "labels": torch.where(chosen, input_ids, -100)}


def inference(model, batch: dict) -> Callable[[], torch.Tensor]:
    """Hidden states of the cells, nothing kept."""
    model.eval()

    @torch.no_grad()
    def run():
        with torch.autocast(DEVICE, torch.bfloat16):
            return model.scbert(batch["input_ids"]).last_hidden_state

    return run


def pretraining(model, batch: dict) -> Callable[[], float]:
    """Forward, backward, Adam; the loss."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4, fused=True)

    def run():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


JOBS = {"inference": inference, "pretraining": pretraining}


def measure_speed(job: str, way: str, batch: int, length: int, layers: int, repeats: int) -> dict:
    """Cells per second, and peak memory."""
    attention, backends = WAYS[way]
    before = torch.cuda.memory_allocated()
    with backends():
        run = JOBS[job](*build(batch, length, layers, attention))
        return timed(run, batch, repeats, before)


def measure_graph(batch: int, length: int, layers: int, repeats: int) -> dict:
    """Inference captured in a CUDA graph, and how far its output is from that without."""
    before = torch.cuda.memory_allocated()
    run = inference(*build(batch, length, layers))
    wanted = run().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    found = timed(graph.replay, batch, repeats, before)
    return found | {"difference": ((output - wanted).abs().max() / wanted.abs().max()).item()}


def timed(run: Callable[[], object], batch: int, repeats: int, before: int) -> dict:
    """Of the best run after warming up; memory above what was held before the model was made, in GiB."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"cells_per_second": batch / best, "peak_gib": peak}


def show(found: dict) -> str:
    """A line of the report."""
    if "failed" in found:
        figures = f"FAILED: {found['failed']}"
    elif found["kind"] == "speed":
        figures = f"{found['cells_per_second']:,.1f} cells/s, {found['peak_gib']:.2f} GiB"
        figures += f", {found['difference']:.0e} off" if "difference" in found else ""
    else:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found["errors"].items())
        figures = f"{'WRONG' if is_bad(found) else 'ok'}: {errors}"
    return f"{found['kind']} ({found['of']}): {figures}"


if __name__ == "__main__":
    sys.exit(main())
