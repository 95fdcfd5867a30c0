"""Pictures of explanations: the SHAP-style summary of contributions, and top genes by cell type."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from matplotlib.figure import Figure

from ..evaluation.metrics import shortened

# more points than this only thicken the swarm
MAX_CELLS = 2000


def plot_summary(
    contributions: np.ndarray,
    expression: np.ndarray | sp.csr_matrix,
    gene_names: Sequence[str],
    path: str | Path,
    n_genes: int,
    title: str,
) -> Figure:
    """
    SHAP-style summary ("beeswarm"): one row per gene, one point per cell, coloured by expression.

    The contributions [cells, genes] to the explained output are for it on the right, against it on the left; of more
    than 2,000 cells as many are drawn. The expression [cells, genes], bins or values, gives the colours, scaled within
    a gene from its 5th to its 95th percentile. The genes drawn are those with the largest mean absolute contribution
    over all cells, which stands beside the name.
    """
    contributions = np.asarray(contributions, dtype=np.float64)
    if (
        contributions.shape != expression.shape
        or contributions.shape[1:] != (len(gene_names),)
        or not len(contributions)
    ):
        raise ValueError(
            f"contributions and expression must both be [cells, {len(gene_names)}] with at least one cell; "
            f"got {contributions.shape} and {expression.shape}"
        )
    importance = np.abs(contributions).mean(axis=0)
    shown = np.argsort(-importance, kind="stable")[:n_genes]
    expression = sp.csc_matrix(expression)
    cells = np.arange(len(contributions))
    if len(cells) > MAX_CELLS:
        cells = np.sort(np.random.default_rng(0).choice(cells, MAX_CELLS, replace=False))
    size = (6.4, 1.4 + 0.3 * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    points = None
    for row, gene in enumerate(shown):
        values = contributions[cells, gene]
        colours = _scaled(expression[:, [gene]].toarray().ravel().astype(np.float64)[cells])
        # the highest expressed on top, so that a few of them stay visible.
        order = np.argsort(colours, kind="stable")
        points = axes.scatter(
            values[order],
            (row + _swarm(values))[order],
            c=colours[order],
            cmap="coolwarm",
            vmin=0,
            vmax=1,
            s=9,
            linewidths=0,
            rasterized=True,
        )
    labels = [f"{gene_names[gene]}  ({importance[gene]:.2g})" for gene in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("contribution (in brackets: mean absolute value)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(points, ax=axes, aspect=40, pad=0.02, ticks=[0, 1])
    bar.ax.set_yticklabels(["low", "high"])
    bar.set_label("expression", labelpad=-12)
    figure.savefig(path, dpi=150)
    return figure


def _scaled(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, [5, 95])
    if high <= low:
        # a gene silent in nearly all cells: the percentiles coincide, its range doesn't.
        low, high = values.min(), values.max()
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.full(len(values), 0.5)


def _swarm(values: np.ndarray, n_bins: int = 100, width: float = 0.4) -> np.ndarray:
    """Offsets that stack points of nearly equal value symmetrically, [points], within `width` of 0."""
    span = np.ptp(values)
    # all in one bin where they are equal
    bins = ((values - values.min()) / (span or 1) * n_bins).astype(int)
    order = np.argsort(bins, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(bins[order])) + 1]
    sizes = np.diff(np.r_[starts, len(values)])
    place = np.arange(len(values)) - np.repeat(starts, sizes)
    # 0, 1, -1, 2, -2, ... from the middle outwards.
    steps = (place + 1) // 2 * np.where(place % 2 == 1, 1, -1)
    # a bin's height grows with the root of its cells: the pile of silent cells must not flatten the others.
    heights = width * np.sqrt(sizes / sizes.max()) / np.maximum(sizes // 2, 1)
    return (steps * np.repeat(heights, sizes))[np.argsort(order)]


def plot_top_genes(table: pd.DataFrame, scores: pd.DataFrame, path: str | Path, n_top: int = 5) -> Figure:
    """
    Heat map of every type's `n_top` genes over all types, z-scored within a gene, saved to `path`.

    The table is of `markers.top_genes_table`, of the `scores` [genes, types]. A gene on top of several types is drawn
    once, with the first.
    """
    genes = list(dict.fromkeys(table.loc[table["rank"] <= n_top, "gene"]))
    values = scores.loc[genes].to_numpy(dtype=np.float64)
    spread = values.std(axis=1, keepdims=True)
    values = (values - values.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    size = (max(2.6 + 0.36 * scores.shape[1], 4.2), max(1.8 + 0.2 * len(genes), 3.4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    types = [shortened(str(name), 28) for name in scores.columns]
    axes.set_xticks(range(len(types)), types, rotation=45, ha="right", fontsize=8, rotation_mode="anchor")
    axes.set_yticks(range(len(genes)), genes, fontsize=7)
    figure.colorbar(image, ax=axes, label="z-score over types", shrink=0.7)
    figure.savefig(path, dpi=150)
    return figure
