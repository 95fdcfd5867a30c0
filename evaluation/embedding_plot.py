"""Cells on a plane, the same colours in every panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require

# Paul Tol's muted scheme and two of his light one: told apart with any colour vision, in this order
COLOURS = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#44aa99",
    "#aa4499", "#999933", "#882255", "#ee8866", "#77aadd", "#bbcc33",
)  # fmt: skip
MARKERS = ("o", "^", "s", "D", "v")
BACKGROUND, UNASSIGNED_COLOUR = "#e4e4e4", "#777777"
LABEL_LENGTH = 30


def plot_embedding(
    coordinates: np.ndarray,
    panels: Mapping[str, Sequence[str]],
    path: str | Path | None = None,
    background: np.ndarray | None = None,
    title: str | None = None,
) -> Any:
    """
    Draw cells in two dimensions, one panel per set of labels, with one legend for all.

    Parameters
    ----------
    coordinates
        For instance ``adata.obsm["X_umap"]``, [cells, 2].
    panels
        Title -> label of every cell, [cells]. A label has the same colour in all panels; "unassigned" is grey.
    path
        Where to save the picture; nothing is saved when None.
    background
        Other cells to show in light grey behind, [n, 2].
    title
        Text above all panels.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> xy = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> figure = plot_embedding(xy, {"truth": ["B", "T"], "prediction": ["B", "B"]}, "umap.png")
    """
    shown = [np.asarray(labels).astype(str) for labels in panels.values()]
    names = sorted(set(np.concatenate(shown)) - {"unassigned"})
    styles = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % 5]) for i, name in enumerate(names)
    }
    if any("unassigned" in labels for labels in shown):
        styles["unassigned"] = (UNASSIGNED_COLOUR, "x")
    figure = require("matplotlib.figure").Figure(figsize=(3.6 * len(panels) + 2.8, 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    size = float(np.clip(6000 / max(len(coordinates), 1), 2, 26))
    for panel, heading, labels in zip(axes, panels, shown, strict=True):
        if background is not None:
            panel.scatter(*background.T, s=size * 0.6, c=BACKGROUND, linewidths=0)
        for name, (colour, marker) in styles.items():
            chosen = labels == name
            edge = {"linewidths": 1} if marker == "x" else {"edgecolors": "white", "linewidths": 0.3}
            panel.scatter(*coordinates[chosen].T, s=size, c=colour, marker=marker, **edge)
        panel.set_title(heading, fontsize=10)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color("#bbbbbb")
    figure.legend(
        handles=[_handle(name, *style) for name, style in styles.items()],
        loc="outside right center",
        frameon=False,
        fontsize=8.5,
        handletextpad=0.2,
    )
    if title:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _handle(name: str, colour: str, marker: str) -> Any:
    label = name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"
    line = require("matplotlib.lines").Line2D
    return line([], [], color=colour, marker=marker, linestyle="", markersize=6, label=label)


def umap_of(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Places of cells in a picture, [cells, 2], by scanpy's UMAP (with this seed) of their vectors [cells, features].

    Up to three cells are returned on a line.

    Examples
    --------
    >>> umap_of(np.random.default_rng(0).normal(size=(30, 4))).shape
    (30, 2)
    """
    if len(vectors) <= 3:
        return np.stack([np.arange(len(vectors)), np.zeros(len(vectors))], axis=1).astype(float)
    scanpy, anndata = require("scanpy", "scanpy"), require("anndata")
    cells = anndata.AnnData(obsm={"X": np.asarray(vectors, dtype=np.float32)})
    neighbours = min(15, len(vectors) - 1)
    scanpy.pp.neighbors(cells, n_neighbors=neighbours, use_rep="X", random_state=seed)
    # a random start: the spectral one fails on very few cells
    scanpy.tl.umap(cells, random_state=seed, init_pos="random" if len(vectors) < 50 else "spectral")
    return np.asarray(cells.obsm["X_umap"])
