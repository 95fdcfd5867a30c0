"""
Tables and plot of what benchmarks/speed.py measured, and the figures of docs/performance.md.

    python benchmarks/speed_report.py benchmarks/results/speed.json docs/performance.md
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

from page_tables import files_told, put, table


def tables(results: dict) -> list[Table]:
    """The results as tables for a terminal."""
    made = []
    for title, header, rows in sections(results):
        shown = Table(title=title)
        for column in header:
            shown.add_column(column, justify="left" if column == header[0] else "right")
        for row in rows:
            shown.add_row(*row)
        made.append(shown)
    return made


def sections(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table."""
    length, n_layers = results["settings"]["length"], results["settings"]["n_layers"]
    found = []
    for task, ways in results["tasks"].items():
        rows = [
            [name, f"{way['median']:.2f}", f"{way['speedup']:.1f}x", f"{way['peak_gib']:.2f}", error_of(way)]
            for name, way in ways.items()
        ]
        title = f"{task.capitalize()}, one cell of {length:,} tokens, {n_layers} layers"
        found.append((title, ["way", "seconds", "speed-up", "peak GiB", "error"], rows))
    lines = [
        [
            name,
            f"{line['points'][0][0]:,} to {line['points'][-1][0]:,}",
            f"{line['seconds_per_1000']:.4f}",
            f"{line['r_squared']:.4f}",
            f"{line['exponent']:.2f}",
        ]
        for name, line in results["lengths"].items()
    ]
    header = ["attention", "tokens", "seconds per 1,000", "R2 of a line", "exponent at the end"]
    found.append(("Inference by length", header, lines))
    ways = [
        name for name in ("naive", "engine", "compiled") if any(name in row for row in results["batches"])
    ]
    rows = [
        [f"{row['length']:,}", str(row["cells"]), *(f"{row[way]:.2f}" if way in row else "-" for way in ways)]
        for row in results["batches"]
    ]
    header = ["tokens", "cells", *(f"{way}, cells/s" for way in ways)]
    found.append(("Inference by batch size", header, rows))
    rows = [
        [
            row["step"],
            f"{row['float32']:.3f}",
            f"{row['bfloat16']:.3f}",
            f"{row['float32'] / row['bfloat16']:.2f}x",
        ]
        for row in results["steps"]
    ]
    header = ["step", "float32, ms", "bfloat16, ms", "speed-up"]
    found.append(("Steps on a chunk of 768 positions", header, rows))
    return found


def error_of(way: dict) -> str:
    """Largest difference from the naive output, relative to its largest entry."""
    return f"{way['relative_error']:.0e}" if "relative_error" in way else ""


def markdown(results: dict) -> str:
    """The results as Markdown, with what they were measured on."""
    machine = results["machine"]
    parts = [
        f"Measured on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, in one "
        f"interleaved run of {results['minutes']} minutes. {sentence(results['onednn'])} "
        f"{sentence(results['compiled'])}",
    ]
    for title, header, rows in sections(results):
        parts += [f"**{title}**", table(header, rows)]
    parts.append("![Seconds by length, and speed-ups](speed.png)")
    return "\n\n".join(parts)


def sentence(text: str) -> str:
    """With a capital, and the rest as it is."""
    return text[:1].upper() + text[1:]


def plot(results: dict, path: Path) -> None:
    """Seconds by length with their straight lines, and the speed-up of every way."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    for name, line in results["lengths"].items():
        x, y = zip(*line["points"], strict=True)
        (drawn,) = left.plot(x, y, "o", label=name)
        if name != "softmax":
            fitted = [line["intercept"] + line["seconds_per_1000"] * value / 1000 for value in x]
            left.plot(x, fitted, color=drawn.get_color(), linewidth=1)
        else:
            left.plot(x, y, color=drawn.get_color(), linewidth=1, linestyle=":")
    left.set(xlabel="tokens", ylabel="seconds per cell", title="Inference by length")
    left.set_ylim(bottom=0)
    left.legend()
    names, speedups = [], []
    for task, ways in results["tasks"].items():
        for name, way in ways.items():
            names.append(f"{task}: {name}")
            speedups.append(way["speedup"])
    right.barh(names[::-1], speedups[::-1])
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xlabel="times as fast as naive", title=f"One cell of {results['settings']['length']:,} tokens")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    source, target = files_told(__doc__)
    put(markdown(json.loads(source.read_text())), "speed", target)
