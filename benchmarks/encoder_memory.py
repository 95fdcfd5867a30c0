"""Time and peak memory of the encoders: over length (favor, lsh, softmax) and, reversible or not, over depth.

    python benchmarks/encoder_memory.py --json --output encoder_memory.json --png encoder_memory.png

Every figure is one training step (forward and backward, batch 1) of the published width in a process of its own, so
that no peak is another's. Memory counts what the step takes above the model: weights, gradients and imports are taken
off; and what glibc keeps of freed blocks, which grows with the number of calls and is not the step's, is given back at
once (hence two processes a case: giving back costs time).

``softmax`` is exact attention by torch's fused kernel, ``matrix`` the same with the whole matrix of weights in memory,
as the models this one is compared with have it; where that would take more than --limit GiB it is not run.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scbert.modeling_scbert import ScBertConfig, ScBertModel
from tokenizer_speed import peak_gib

ENCODERS = ("favor", "lsh", "softmax", "matrix")
NAMES = {"favor": "favor", "lsh": "lsh, reversible", "softmax": "softmax, fused", "matrix": "softmax, matrix"}
COLOURS = {"favor": "#117733", "lsh": "#cc6677", "softmax": "#332288", "matrix": "#88ccee"}
GIB = 2**30
# blocks above so many bytes are mapped, and unmapped when freed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "100000"}
# float32 matrices of weights alive at the peak of a training step, measured at 2,000 to 4,000 tokens
MATRICES_ALIVE = 4


def held_gib():
    """Memory this process holds now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def build(case):
    """The model of a case, in training mode."""
    config = ScBertConfig(
        attention_type="softmax" if case["encoder"] == "matrix" else case["encoder"],
        num_hidden_layers=case["layers"],
        reversible=case["reversible"],
        max_position_embeddings=case["length"],
    )
    return ScBertModel(config).train().to(case["device"])


def measure(case, steps=2):
    """Seconds of a training step, the best of some, and its peak memory in GiB; in the process that asks."""
    torch.manual_seed(0)
    model = build(case)
    cells = torch.randint(0, 6, (1, case["length"]), device=case["device"])
    gradients = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    on_gpu = case["device"] == "cuda"
    before = torch.cuda.memory_allocated() / GIB if on_gpu else held_gib()
    seconds = []
    for _ in range(steps):
        model.zero_grad()
        start = time.perf_counter()
        with sdpa_kernel(SDPBackend.MATH) if case["encoder"] == "matrix" else contextlib.nullcontext():
            model(cells).last_hidden_state.square().mean().backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else peak_gib()
    return {**case, "seconds": min(seconds), "peak_gib": max(0.0, peak - before - gradients)}


def matrix_gib(length, heads=10):
    """What the matrices of attention weights of a training step would take, in GiB."""
    return MATRICES_ALIVE * heads * length**2 * 4 / GIB


def in_fresh_process(case, limit):
    """`measure` in a new process; without a figure where the matrix would be beyond the limit."""
    if case["encoder"] == "matrix" and matrix_gib(case["length"]) > limit:
        return {**case, "seconds": None, "peak_gib": None, "needs_gib": matrix_gib(case["length"])}
    found = {}
    for figure, steps, variables in (("peak_gib", 1, GIVE_BACK), ("seconds", 2, {})):
        command = [sys.executable, __file__, "--case", json.dumps(case), "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {**case, "seconds": None, "peak_gib": None, "failed": reason[:200]}
        found[figure] = json.loads(done.stdout)[figure]
    return {**case, **found}


def cases(arguments):
    """Every case of a run: over length at two layers, then over depth at one length."""
    common = {"device": arguments.device}
    for length in arguments.lengths:
        for encoder in ENCODERS:
            yield {
                "encoder": encoder,
                "length": length,
                "layers": 2,
                "reversible": encoder == "lsh",
                **common,
            }
    for encoder in ("favor", "lsh"):
        for reversible in (False, True):
            for layers in arguments.depths:
                sizes = {"length": arguments.depth_length, "layers": layers}
                yield {"encoder": encoder, "reversible": reversible, **sizes, **common}


def show_row(row):
    """A line of the table, on stderr."""
    name = row["encoder"] + (" reversible" if row["reversible"] else "")
    if row["seconds"] is None:
        reason = f"not run: needs {row['needs_gib']:.0f} GiB" if "needs_gib" in row else row["failed"]
    else:
        reason = f"{row['seconds']:9.2f} s {row['peak_gib']:9.3f} GiB"
    print(f"{name:18} {row['length']:7,} tokens {row['layers']:3} layers {reason}", file=sys.stderr)


def draw(rows, depth_length, path):
    """Memory and time over length, and memory over depth, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for encoder in ENCODERS:
        chosen = [
            row for row in rows if row["encoder"] == encoder and row["part"] == "length" and row["seconds"]
        ]
        for axis, value in zip(axes, ("peak_gib", "seconds")):
            x, y = [r["length"] for r in chosen], [r[value] for r in chosen]
            axis.loglog(x, y, marker="o", color=COLOURS[encoder], label=NAMES[encoder])
    for encoder in ("favor", "lsh"):
        for reversible in (False, True):
            chosen = [row for row in rows if row["part"] == "depth" and row["seconds"]]
            chosen = [r for r in chosen if r["encoder"] == encoder and r["reversible"] == reversible]
            label = f"{encoder}{', reversible' if reversible else ''}"
            style = {"marker": "o", "color": COLOURS[encoder], "linestyle": "-" if reversible else "--"}
            axes[2].plot([r["layers"] for r in chosen], [r["peak_gib"] for r in chosen], label=label, **style)
    axes[0].set(title="2 layers", xlabel="tokens", ylabel="peak memory of a training step (GiB)")
    axes[1].set(title="2 layers", xlabel="tokens", ylabel="time of a training step (s)")
    axes[2].set(title=f"{depth_length:,} tokens", xlabel="layers", ylabel="peak memory (GiB)", ylim=(0, None))
    for axis in axes:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Read options, measure case after case, write table, JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 17331])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6, 12])
    parser.add_argument("--depth-length", type=int, default=4000)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit", type=float, default=6.0, help="GiB the whole matrix may take")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--png", type=Path, help="picture to write")
    parser.add_argument("--json", action="store_true", help="print one line of JSON on stdout")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.steps)))
        return
    rows = []
    for i, case in enumerate(cases(arguments)):
        part = "length" if i < len(arguments.lengths) * len(ENCODERS) else "depth"
        rows.append({"part": part, **in_fresh_process(case, arguments.limit)})
        show_row(rows[-1])
    cuda = arguments.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, threads: {torch.get_num_threads()}"
    result = {"device": device, "torch": torch.__version__, "dtype": "float32", "rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.png:
        draw(rows, arguments.depth_length, arguments.png)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
