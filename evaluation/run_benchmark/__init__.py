"""Benchmarks: protocols, contestants and their controls on the same folds; the job behind `scbert evaluate`."""

from .protocols import PROTOCOLS
from .run import run_benchmark

__all__ = ["PROTOCOLS", "run_benchmark"]
