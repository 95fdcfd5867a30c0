"""
The steps of attention on one chunk of positions, in float32 and in bfloat16: why the latter gains little on a CPU.

    python benchmarks/speed_steps.py
"""

import json
import time
from collections.abc import Callable

import torch

from scbert.modeling_scbert.cpu_matmul_scbert import restore_matmul, use_onednn

HEADS, DIM, FEATURES = 10, 64, 266


def measure_steps(positions: int = 768, repeats: int = 20) -> list[dict]:
    """Milliseconds of every step, best of all repeats, float32 and bfloat16 in turn; products by oneDNN."""
    use_onednn()
    try:
        ways = {dtype: chunk_steps(positions, dtype) for dtype in (torch.float32, torch.bfloat16)}
        found = [
            {"step": name, "float32": float("inf"), "bfloat16": float("inf")} for name in ways[torch.float32]
        ]
        for _ in range(repeats):
            for row in found:
                for dtype, steps in ways.items():
                    start = time.perf_counter()
                    steps[row["step"]]()
                    name = str(dtype).removeprefix("torch.")
                    row[name] = min(row[name], 1e3 * (time.perf_counter() - start))
    finally:
        restore_matmul()
    return found


def chunk_steps(positions: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The steps by name, on tensors of their own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(dtype)

    x, projection = draw(HEADS * positions, DIM), draw(DIM, FEATURES)
    logs = draw(HEADS, positions, FEATURES)
    values, table = draw(HEADS, positions, DIM + 1), draw(HEADS, FEATURES, DIM + 1)
    hidden, weight = draw(positions, 200), draw(200, 800)
    product, sums, out = draw(HEADS * positions, FEATURES), torch.empty_like(table), torch.empty_like(values)
    # overwritten in place, as in the engine; the time does not depend on the values
    scratch, inner = logs.clone(), draw(positions, 800)
    return {
        "projection (200 to 800)": lambda: torch.mm(hidden, weight, out=inner),
        "features: product": lambda: torch.mm(x, projection, out=product),
        "features: row maximum": lambda: logs.amax(-1),
        "features: exp2": lambda: scratch.exp2_(),
        "context: product": lambda: torch.bmm(logs.mT, values, out=sums),
        "output: product": lambda: torch.bmm(logs, table, out=out),
    }


if __name__ == "__main__":
    print(json.dumps(measure_steps(), indent=1))
