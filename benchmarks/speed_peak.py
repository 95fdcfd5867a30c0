"""
Peak memory of one job done one way, above what the imports take: run by speed.py, in a process of its own.

    python benchmarks/speed_peak.py inference engine 6 16907 2
"""

import sys
from pathlib import Path

import torch

from speed_tasks import TASKS, VARIANTS, build_config


def peak_of_one_run(task: str, name: str, n_layers: int, length: int) -> float:
    """Peak memory in GiB of one run; of two, where the second keeps what the first has set up."""
    before = memory_gib("VmRSS")
    run = TASKS[task](build_config(n_layers, length), 1, length)
    for _ in range(1 if task == "inference" else 2):
        run(VARIANTS[task][name])
    return memory_gib("VmHWM") - before


def memory_gib(name: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM)."""
    # not getrusage: its peak includes that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


if __name__ == "__main__":
    task, name, *sizes = sys.argv[1:]
    n_layers, length, threads = map(int, sizes)
    torch.set_num_threads(threads)
    print(peak_of_one_run(task, name, n_layers, length))
