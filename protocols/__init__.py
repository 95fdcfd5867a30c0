"""Benchmarks: protocols, methods and their baselines on the same folds; the job behind `scbert evaluate`."""

from .folds import PROTOCOLS
from .run import run_benchmark

__all__ = ["PROTOCOLS", "run_benchmark"]
