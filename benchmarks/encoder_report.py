"""
The tables of what benchmarks/encoder_memory.py measured, put between the markers of a page.

    python benchmarks/encoder_report.py benchmarks/results/encoder_memory.json docs/performance.md
"""

import json

from encoder_memory import ENCODERS, NAMES
from page_tables import files_told, put, table


def markdown(result: dict) -> str:
    """Memory and time over length, and memory over depth, as Markdown."""
    rows = result["rows"]
    parts = [
        f"Measured on {result['device']}, torch {result['torch']}, {result['dtype']}: one training step (forward and "
        "backward, one cell) of the published width, each in a process of its own; memory above weights, gradients "
        "and imports."
    ]
    over = {(r["encoder"], r["length"]): r for r in rows if r["part"] == "length"}
    lengths = sorted({length for _, length in over})
    for title, figure in (("GiB", memory), ("seconds", seconds)):
        lines = [[f"{length:,}", *(figure(over[name, length]) for name in ENCODERS)] for length in lengths]
        header = ["tokens", *(NAMES[name] for name in ENCODERS)]
        parts += [f"**Two layers, {title}**", table(header, lines)]
    deep = [r for r in rows if r["part"] == "depth"]
    depths = sorted({r["layers"] for r in deep})
    lines = []
    for encoder, reversible in dict.fromkeys((r["encoder"], r["reversible"]) for r in deep):
        mine = {r["layers"]: r for r in deep if (r["encoder"], r["reversible"]) == (encoder, reversible)}
        name = f"{encoder}{', reversible' if reversible else ''}"
        lines.append([name, *(memory(mine[d]) for d in depths), *(seconds(mine[d]) for d in depths)])
    header = ["encoder", *(f"{d} layers, GiB" for d in depths), *(f"{d} layers, s" for d in depths)]
    parts += [f"**Over depth, {deep[0]['length']:,} tokens**", table(header, lines)]
    return "\n\n".join(parts)


def memory(row: dict) -> str:
    """Peak of a case, or what it would have needed."""
    if row["peak_gib"] is None:
        return f"not run, needs {row['needs_gib']:.0f}" if "needs_gib" in row else "failed"
    return f"{row['peak_gib']:.2f}"


def seconds(row: dict) -> str:
    """Time of a case."""
    return "-" if row["seconds"] is None else f"{row['seconds']:.1f}"


if __name__ == "__main__":
    source, target = files_told(__doc__)
    put(markdown(json.loads(source.read_text(encoding="utf-8"))), "encoders", target)
