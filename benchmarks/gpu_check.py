"""
The Triton kernels on a CUDA machine: right first, then how fast and in how much memory.

    python benchmarks/gpu_check.py --output benchmarks/results/gpu_check.json

Outputs and gradients are compared with the naive reference in float64, at small sizes with masks and uneven lengths and
at the model's own size; then cells per second and peak memory of inference and of pretraining steps in bfloat16. Exit
code 1 where an error is above its bound or the portable engine had to step in. Needs this checkout, which need not be
installed, with torch, transformers and triton.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import torch

if not __package__:
    # run as a file: the checkout is the package, without what its own __init__ would import
    root = Path(__file__).resolve().parent.parent
    for name, folder in (("scbert", root), ("scbert.benchmarks", root / "benchmarks")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    __package__ = "scbert.benchmarks"

from ..modeling_scbert import ScBertConfig, ScBertForMaskedExpression
from ..modeling_scbert import favor_engine_scbert as engine
from ..modeling_scbert import favor_triton_scbert as launcher
from ..modeling_scbert.backends_scbert import favor_backend
from ..modeling_scbert.favor_engine_scbert import favor_attention
from ..modeling_scbert.favor_scbert import draw_projection, favor_attention_naive

# largest error of output and gradients, relative to the largest entry
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
# cells, heads, queries, keys, head size, value width, features, masked
CASES = [
    (2, 2, 37, 37, 16, 12, 75, False),
    (2, 3, 70, 130, 64, 64, 266, True),
    (1, 2, 1000, 513, 64, 64, 266, False),
    (3, 1, 65, 64, 32, 128, 128, True),
    (1, 10, 16_907, 16_907, 64, 64, 266, False),
    (2, 10, 4_000, 4_000, 64, 64, 266, True),
]
GOALS = {"inference_cells_per_second": 1000, "pretraining_cells_per_second": 300, "peak_gib": 4}


def main() -> int:
    """Check, measure, print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=16_907)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="also time the kernels with other tiles")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a step goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device.", file=sys.stderr)
        return 1
    results = {"device": describe_device(), "checks": [check(*case) for case in checks()]}
    results["portable_engine_stepped_in"] = bool(engine._disabled)
    print_checks(results)
    sizes = (arguments.batch, arguments.length, arguments.layers, arguments.repeats)
    results["attention"] = [attention_speed(*sizes[:2], *way) for way in attention_ways()]
    results["model"] = [model_speed(*sizes, job, compiled) for job in JOBS for compiled in (False, True)]
    print_speeds(results)
    if arguments.sweep:
        results["sweep"] = sweep(*sizes[:2])
    if arguments.profile:
        print_profile(*sizes[:3])
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    bad = [check for check in results["checks"] if not check["error"] <= BOUNDS[check["dtype"]]]
    return int(bool(bad) or results["portable_engine_stepped_in"])


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


def checks() -> list[tuple]:
    """Every case in both precisions."""
    return [(dtype, *case) for case in CASES for dtype in BOUNDS]


def check(dtype, cells, heads, queries, keys, dim, width, features, masked) -> dict:
    """Largest relative error of the output and the three gradients."""
    torch.manual_seed(0)
    shapes = ((queries, dim), (keys, dim), (keys, width))
    tensors = [
        torch.randn(cells, n, heads, w, device="cuda")
        .to(getattr(torch, dtype))
        .transpose(1, 2)
        .requires_grad_()
        for n, w in shapes
    ]
    projection = draw_projection(features, dim, torch.Generator().manual_seed(0)).cuda()
    mask = torch.rand(cells, keys, device="cuda") < 0.6 if masked else None
    output = favor_attention(*tensors, projection, mask)
    grad = torch.randn(output.shape, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = favor_attention_naive(*exact, projection.double(), mask)
    found = [output, *torch.autograd.grad(output, tensors, grad.to(output.dtype))]
    wanted = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, wanted, strict=True)]
    shape = f"{cells} x {heads} x ({queries}, {keys}) x ({dim}, {width}), {features} features"
    return {"dtype": dtype, "case": shape + ", masked" * masked, "errors": errors, "error": max(errors)}


def timed(run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Best seconds of a run, after warming up, and peak memory in GiB above what was held before."""
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
    return best, torch.cuda.max_memory_allocated() / 2**30


def attention_ways() -> list[tuple[str, Callable, bool]]:
    """FAVOR+ by the kernels and by the portable engine, exact attention by torch; forward, and with backward."""

    def portable(query, key, value, projection):
        with favor_backend("chunked"):
            return favor_attention(query, key, value, projection)

    def exact(query, key, value, projection):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    ways = [("kernels", favor_attention), ("portable engine", portable), ("exact softmax", exact)]
    return [(name, way, backward) for backward in (False, True) for name, way in ways]


def attention_speed(batch: int, length: int, name: str, attention: Callable, backward: bool) -> dict:
    """Milliseconds of one layer's attention per cell."""
    batch = min(batch, 8)
    tensors = [
        torch.randn(batch, length, 10, 64, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_(backward)
        for _ in range(3)
    ]
    projection = draw_projection(266, 64, torch.Generator().manual_seed(0)).cuda()

    def run():
        output = attention(*tensors, projection)
        if backward:
            torch.autograd.grad(output, tensors, output)

    seconds, _ = timed(run, 5)
    return {"attention": name, "backward": backward, "ms_per_cell": 1e3 * seconds / batch}


def sweep(batch: int, length: int) -> list[dict]:
    """The kernels with other tiles, fastest forward and backward first."""
    kept, found = dict(launcher.TILES), []
    for block_m, block_n, warps, stages in product((64, 128), (64, 128), (4, 8), (2, 3)):
        tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        launcher.TILES.update(tiles)
        try:
            speeds = [
                attention_speed(batch, length, "kernels", favor_attention, backward)["ms_per_cell"]
                for backward in (False, True)
            ]
            failed = bool(engine._disabled)
        except Exception as error:
            speeds, failed = [None, None], str(error)[:100]
        engine._disabled.clear()
        found.append(tiles | {"forward_ms": speeds[0], "both_ms": speeds[1], "failed": failed})
        print(found[-1], flush=True)
    launcher.TILES.update(kept)
    return sorted(found, key=lambda way: (bool(way["failed"]), way["both_ms"] or 0))


def inference_job(model, batch: dict) -> Callable[[], None]:
    """Encode and decode, nothing kept."""

    @torch.inference_mode()
    def run():
        with torch.autocast("cuda", torch.bfloat16):
            model.eval()(**{"input_ids": batch["input_ids"]})

    return run


def pretraining_job(model, batch: dict) -> Callable[[], None]:
    """Forward, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def run():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()

    return run


def checkpointed_job(model, batch: dict) -> Callable[[], None]:
    """The same, every layer computed again in the backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return pretraining_job(model, batch)


JOBS = {
    "inference": inference_job,
    "pretraining": pretraining_job,
    "pretraining, checkpointed": checkpointed_job,
}


def build(batch: int, length: int, layers: int) -> tuple[ScBertForMaskedExpression, dict]:
    """The published model and a batch of masked cells, on the GPU."""
    torch.manual_seed(0)
    config = ScBertConfig(max_position_embeddings=length, num_hidden_layers=layers, sparse_prediction=True)
    model = ScBertForMaskedExpression(config).cuda()
    input_ids = torch.randint(1, 6, (batch, length), device="cuda")
    input_ids = input_ids * (torch.rand(batch, length, device="cuda") < 0.1)
    chosen = (input_ids > 0) & (torch.rand(batch, length, device="cuda") < 0.15)
    return model, {"input_ids": input_ids, "labels": torch.where(chosen, input_ids, -100)}


def model_speed(batch: int, length: int, layers: int, repeats: int, job: str, compiled: bool) -> dict:
    """Cells per second and peak memory of a job on the whole model."""
    found = {"job": job, "compiled": compiled, "batch": batch, "length": length}
    torch.cuda.empty_cache()
    try:
        model, inputs = build(batch, length, layers)
        run = JOBS[job](model, inputs)
        if compiled:
            model.scbert.compile(dynamic=False)
        seconds, peak = timed(run, repeats)
        found |= {"cells_per_second": batch / seconds, "peak_gib": peak}
    except Exception as error:
        # a job that does not fit or compile is a finding, and the others are still to be measured
        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    torch._dynamo.reset()
    return found


def print_checks(results: dict) -> None:
    """Errors against their bounds."""
    print(results["device"])
    for found in results["checks"]:
        verdict = "ok" if found["error"] <= BOUNDS[found["dtype"]] else "WRONG"
        print(f"{verdict:6}{found['dtype']:10}{found['error']:.1e}  {found['case']}", flush=True)
    if results["portable_engine_stepped_in"]:
        print("The kernels did not run: what follows is the portable engine.")


def print_speeds(results: dict) -> None:
    """Figures beside the goals."""
    for found in results["attention"]:
        way = f"{found['attention']}, {'forward and backward' if found['backward'] else 'forward'}"
        print(f"{way:40}{found['ms_per_cell']:.3f} ms per cell and layer")
    for found in results["model"]:
        way = f"{found['job']}{', compiled' if found['compiled'] else ''}, batch {found['batch']}"
        figures = found.get("error") or (
            f"{found['cells_per_second']:8.0f} cells/s {found['peak_gib']:6.1f} GiB"
        )
        print(f"{way:45}{figures}", flush=True)
    print(f"goals: {GOALS}")


def print_profile(batch: int, length: int, layers: int) -> None:
    """The kernels that take most of a pretraining step."""
    model, inputs = build(batch, length, layers)
    run = pretraining_job(model, inputs)
    run()
    with torch.profiler.profile() as profiled:
        run()
        torch.cuda.synchronize()
    print(
        profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60)
    )


if __name__ == "__main__":
    sys.exit(main())
