"""Pictures of how a released model was trained."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RED, GREY = "#cc6677", "#777777"


def plot_pretraining(metrics: dict[str, Any], path: str | Path) -> None:
    """
    Loss of the whole cell and masked accuracy by step, each beside its baselines.

    Parameters
    ----------
    metrics
        What `scbert pretrain` writes to metrics.json.
    path
        Picture to write.
    """
    history = metrics["training"]["history"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    draw(losses, history, "eval_cell_loss", "validation", RED, marker="o")
    line(losses, metrics["baseline_cell_loss"], "the mean cell", "--")
    losses.set_title("cross-entropy of the whole cell", fontsize=10)
    draw(accuracies, history, "eval_masked_accuracy", "validation", RED, marker="o")
    line(accuracies, metrics["baseline_masked_accuracy"], "each gene's commonest bin", "--")
    line(accuracies, metrics["cell_baseline_masked_accuracy"], "the cell's own commonest bin", ":")
    accuracies.set_title("masked accuracy", fontsize=10)
    for axes in (losses, accuracies):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def draw(
    axes: Any, history: list[dict[str, float]], name: str, label: str, colour: str, marker: str | None = None
):
    """One figure of the history by step."""
    points = [(row["step"], row[name]) for row in history if name in row]
    axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=3)


def line(axes: Any, height: float, label: str, style: str) -> None:
    """A baseline, the same at every step."""
    axes.axhline(height, label=label, color=GREY, linestyle=style, linewidth=1)
