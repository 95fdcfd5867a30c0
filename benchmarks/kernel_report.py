"""
The table of what benchmarks/kernel_resources.py found, put between the markers of a page.

    python benchmarks/kernel_report.py benchmarks/results/kernel_resources.json docs/performance.md
"""

import json

from page_tables import files_told, put, table

GPUS = {
    "sm_80": "A100",
    "sm_89": "L4, L40S, RTX 40",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 50",
}


def markdown(result: dict) -> str:
    """A row for each kernel, a column for each kind of GPU; for an H100 also its busiest unit's time."""
    kernels = result["kernels"]
    found = {(row["dtype"], row["kernel"], row["target"]): row for row in kernels}
    targets = list(dict.fromkeys(row["target"] for row in kernels))
    lines = [
        [
            f"{kernel}; {dtype}",
            *(figures(found[dtype, kernel, t]) for t in targets),
            busiest(found, dtype, kernel),
        ]
        for dtype, kernel in dict.fromkeys((row["dtype"], row["kernel"]) for row in kernels)
    ]
    header = ["kernel", *(f"{t} ({GPUS[t]})" for t in targets), "H100, µs at least"]
    said = f"By the compiler of Triton {result['triton']}: registers / bytes spilled / kB shared / programs at a time."
    return f"{said}\n\n{table(header, lines)}"


def figures(row: dict) -> str:
    """Registers a thread, bytes spilled, shared memory of a program, programs that a multiprocessor holds."""
    return f"{row['registers']} / {row['spilled']:,} / {row['shared'] / 1000:.0f} / {row['programs']}"


def busiest(found: dict, dtype: str, kernel: str) -> str:
    """Microseconds a cell that the busiest unit of an H100 needs, and which it is."""
    units = found.get((dtype, kernel, "sm_90"), {}).get("microseconds")
    if not units:
        return ""
    name = max(units, key=units.get)
    return f"{units[name]:.0f} ({name})"


if __name__ == "__main__":
    source, target = files_told(__doc__)
    put(markdown(json.loads(source.read_text(encoding="utf-8"))), "kernels", target)
