"""
Speed and memory of the engine beside a naive stand-in for the original and exact softmax attention.

    python benchmarks/speed.py --output benchmarks/results      # about a quarter of an hour on two cores
    python benchmarks/speed.py --quick                          # small, to see that it works

All ways to do a job are timed in turn, round after round, in one process and on the same weights: quote the ratios,
not the seconds. Peak memory is that of a fresh process for every job and way, above what the imports take. Writes
speed.json and speed.png; `speed_report` writes the tables of docs/performance.md from the former.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from scbert.modeling_scbert import ScBertConfig
from scbert.modeling_scbert.compiled_layer_scbert import compiled_blocks
from scbert.modeling_scbert.cpu_matmul_scbert import restore_matmul, use_onednn
from scbert.modeling_scbert.layers_scbert import ScBertLayer
from speed_report import plot, tables
from speed_steps import measure_steps
from speed_tasks import FULL_LENGTH, TASKS, VARIANTS, Variant, build_config, inference

FULL = {
    "n_layers": 6,
    "length": FULL_LENGTH,
    "rounds": {"inference": 6, "pretraining step": 4, "fine-tuning step": 4},
    "lengths": [1000, 2000, 4000, 8000, 12000, 16000, 20000],
    "softmax_up_to": 8000,
    "length_rounds": 2,
    "batches": [(2000, 1), (2000, 4), (2000, 16), (2000, 32), (FULL_LENGTH, 1), (FULL_LENGTH, 4)],
    # tokens of a batch that the naive way still holds in a few GiB
    "naive_tokens": 64_000,
}
QUICK = {
    "n_layers": 1,
    "length": 2000,
    "rounds": {"inference": 2, "pretraining step": 2, "fine-tuning step": 2},
    "lengths": [500, 1000, 2000, 3000],
    "softmax_up_to": 2000,
    "length_rounds": 2,
    "batches": [(500, 1), (500, 4)],
    "naive_tokens": 64_000,
}


def main() -> None:
    """Measure, print a table, write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one layer and short sequences")
    parser.add_argument("--json", action="store_true", help="print one JSON line on stdout, tables on stderr")
    parser.add_argument("--output", type=Path, help="folder for speed.json and speed.png")
    parser.add_argument("--threads", type=int, help="threads of torch; all cores by default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = measure(QUICK if arguments.quick else FULL)
    console = Console(stderr=arguments.json)
    for table in tables(results):
        console.print(table)
    if arguments.json:
        print(json.dumps(results))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, arguments.output / "speed.png")


def measure(settings: dict) -> dict:
    """Everything, as it is written to speed.json."""
    compiled, onednn = compiled_blocks(ScBertLayer, ScBertConfig), use_onednn()
    restore_matmul()
    variants = {
        task: {
            name: variant
            for name, variant in ways.items()
            if (onednn.enabled or not variant.onednn) and (compiled.operators or not variant.compiled)
        }
        for task, ways in VARIANTS.items()
    }
    engines = {"engine": Variant(onednn=onednn.enabled)}
    if compiled.operators:
        engines["compiled"] = Variant(onednn=onednn.enabled, compiled=True)
    start = time.perf_counter()
    results = {"machine": describe_machine(), "settings": settings, "tasks": {}}
    results |= {"onednn": str(onednn), "compiled": str(compiled)}
    with Progress(console=Console(stderr=True)) as progress:
        steps = progress.add_task("measuring", total=2 * len(variants) + 2)
        for task, ways in variants.items():
            progress.update(steps, description=task)
            results["tasks"][task] = measure_task(task, ways, settings)
            progress.advance(steps)
            for name in ways:
                peak = peak_in_a_fresh_process(task, name, settings["n_layers"], settings["length"])
                results["tasks"][task][name]["peak_gib"] = peak
            progress.advance(steps)
        progress.update(steps, description="lengths")
        results["lengths"] = measure_lengths(settings, engines)
        progress.advance(steps)
        progress.update(steps, description="batches")
        results["batches"] = measure_batches(settings, engines)
        progress.advance(steps)
    results["steps"] = measure_steps()
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    return results


def describe_machine() -> dict:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def measure_task(task: str, ways: dict[str, Variant], settings: dict) -> dict:
    """Seconds of every way in every round, its speed-up over the naive way, and its distance from it."""
    length = settings["length"]
    run = TASKS[task](build_config(settings["n_layers"], length), 1, length)
    seconds = {name: [] for name in ways}
    for variant in ways.values():
        # the cache is filled once and is not what is timed
        if variant.cached:
            run(variant)
    for _ in range(settings["rounds"][task]):
        for name, variant in ways.items():
            seconds[name].append(timed(run, variant))
    found = {name: summary(seconds[name], seconds["naive"]) for name in ways}
    if task == "inference":
        exact = run(ways["naive"])
        for name, variant in ways.items():
            difference = (run(variant).float() - exact).abs().max() / exact.abs().max()
            found[name]["relative_error"] = difference.item()
    return found


def timed(run, variant: Variant) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run(variant)
    return time.perf_counter() - start


def summary(seconds: list[float], naive: list[float]) -> dict:
    """Median of the rounds, and of the ratios within each round."""
    ratios = [theirs / ours for theirs, ours in zip(naive, seconds, strict=True)]
    return {
        "seconds": [round(s, 4) for s in seconds],
        "median": statistics.median(seconds),
        "speedup": statistics.median(ratios),
    }


def measure_lengths(settings: dict, engines: dict[str, Variant]) -> dict:
    """Seconds of inference by length, and the straight line through them."""
    softmax = replace(engines["engine"], attention="softmax")
    ways = {"naive": Variant(naive=True), **engines, "softmax": softmax}
    points = {name: [] for name in ways}
    for length in settings["lengths"]:
        runs = {
            attention: inference(build_config(settings["n_layers"], length, attention), 1, length)
            for attention in ("favor", "softmax")
        }
        rounds = {name: [] for name in ways}
        for _ in range(settings["length_rounds"]):
            for name, variant in ways.items():
                if variant is not softmax or length <= settings["softmax_up_to"]:
                    rounds[name].append(timed(runs[variant.attention], variant))
        for name, seconds in rounds.items():
            if seconds:
                points[name].append([length, min(seconds)])
    return {name: {"points": found, **straight_line(found)} for name, found in points.items()}


def straight_line(points: list[list[float]]) -> dict:
    """Least-squares line, its share of the variance, and the exponent of a power law through the last points."""
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    left_over = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    exponent = np.log(y[-1] / y[-3]) / np.log(x[-1] / x[-3])
    return {
        "seconds_per_1000": slope * 1000,
        "intercept": intercept,
        "r_squared": 1 - left_over,
        "exponent": exponent,
    }


def measure_batches(settings: dict, engines: dict[str, Variant]) -> list[dict]:
    """Cells per second by batch size."""
    found = []
    for length, n_cells in settings["batches"]:
        run = inference(build_config(settings["n_layers"], length), n_cells, length)
        ways = dict(engines)
        if n_cells * length <= settings["naive_tokens"]:
            ways["naive"] = Variant(naive=True)
        rates = {name: n_cells / timed(run, variant) for name, variant in ways.items()}
        found.append({"length": length, "cells": n_cells, **rates})
    return found


def peak_in_a_fresh_process(*job) -> float:
    """Peak memory of a job and way, in GiB above the imports; see speed_peak.py."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("speed_peak.py"))]
    arguments = [*map(str, job), str(torch.get_num_threads())]
    return float(subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
