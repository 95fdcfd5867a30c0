"""
Float32 matrix products by oneDNN instead of MKL, where they are as exact and faster.

On AMD processors MKL runs at less than half the speed of oneDNN, which torch uses for float32 only where it is also
*permitted* bfloat16. Whether it then stays in float32 is up to the processor, so that is measured before it is kept.
"""

import logging
import time
from dataclasses import dataclass

import torch

from .backends_scbert import VARIABLE, is_unwanted, is_wanted

logger = logging.getLogger(__name__)

# relative error of a product that float32 explains; bfloat16 makes 3e-3
MAX_ERROR = 1e-5
# the model's products: features, context, projections, feed-forward network, gradients of weights
SHAPES = ((4096, 64, 266), (266, 1024, 65), (1024, 200, 640), (1024, 800, 200), (200, 4096, 800))


# of work ahead; measuring takes some tenths of a second
SECONDS_TO_PAY = 5.0
# the report, once there is one
_considered = []


@dataclass
class MatmulReport:
    """What was found, and whether it was kept."""

    # float32 products now go to oneDNN
    enabled: bool
    # largest relative error of its products against float64; None where the switch does not exist
    error: float | None = None
    # time of the products before, over the time with oneDNN
    speedup: float | None = None

    def __str__(self) -> str:
        if self.error is None:
            return "oneDNN products cannot be asked for in this version of torch; nothing was changed."
        found = f"{self.speedup:.1f} times as fast with a relative error of {self.error:.0e}"
        kept = f"kept ({VARIABLE}=-onednn forbids them)" if self.enabled else "not kept"
        return f"float32 products by oneDNN: {found}; {kept}."


def use_onednn(max_error: float = MAX_ERROR) -> MatmulReport:
    """
    Let oneDNN do this process's float32 matrix products on the CPU, if it does them in float32 and faster.

    It is not kept where its relative error is above ``max_error``. The report is also logged; `restore_matmul` undoes
    it.

    Examples
    --------
    >>> report = use_onednn()
    >>> report.enabled == (torch.backends.mkldnn.matmul.fp32_precision == "bf16")
    True
    >>> restore_matmul()
    """
    backend = torch.backends.mkldnn
    if not backend.is_available() or not hasattr(getattr(backend, "matmul", None), "fp32_precision"):
        report = MatmulReport(enabled=False)
    else:
        restore_matmul()
        _, before = _measure()
        backend.matmul.fp32_precision = "bf16"
        error, after = _measure()
        report = MatmulReport(error <= max_error and after < before, error, before / after)
        if not report.enabled:
            restore_matmul()
    logger.info("%s", report)
    return report


def consider_onednn(seconds_ahead: float) -> None:
    """Measure once in a process whether to `use_onednn`: where work enough is ahead, or it was asked for by name."""
    if _considered or is_unwanted("onednn"):
        return
    if seconds_ahead >= SECONDS_TO_PAY or is_wanted("onednn"):
        _considered.append(use_onednn())


def restore_matmul() -> None:
    """Undo `use_onednn`."""
    if hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def _measure() -> tuple[float, float]:
    """Largest relative error over the shapes, and the sum of their best times."""
    generator = torch.Generator().manual_seed(0)
    largest, total = 0.0, 0.0
    for rows, inner, columns in SHAPES:
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        product, best = left @ right, float("inf")
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(left, right, out=product)
            best = min(best, time.perf_counter() - start)
        exact = left.double() @ right.double()
        largest = max(largest, ((product - exact).abs().max() / exact.abs().max()).item())
        total += best
    return largest, total
