"""Cells on a plane, the same colours in every panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .metrics import shortened

# Paul Tol's muted scheme and two of his light one: told apart with any colour vision, in this order
COLOURS = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#44aa99",
    "#aa4499", "#999933", "#882255", "#ee8866", "#77aadd", "#bbcc33",
)  # fmt: skip
MARKERS = ("o", "^", "s", "D", "v")
# as many as the picture is high
ROWS_OF_LEGEND = 18
BACKGROUND, UNASSIGNED_COLOUR = "#e4e4e4", "#777777"


def plot_embedding(
    coordinates: np.ndarray,
    panels: Mapping[str, Sequence[str]],
    path: str | Path | None = None,
    background: np.ndarray | None = None,
    title: str | None = None,
) -> Any:
    """
    Draw cells at coordinates [cells, 2], one panel per set of labels, with one legend for all; matplotlib's Figure.

    `panels` holds the label of every cell by title: a label has the same colour in all panels, "unassigned" is grey.
    `background` [n, 2] are other cells, in light grey behind. Nothing is saved without a path.
    """
    shown = [np.asarray(labels).astype(str) for labels in panels.values()]
    names = sorted(set(np.concatenate(shown)) - {"unassigned"})
    styles = {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % 5]) for i, name in enumerate(names)
    }
    if any("unassigned" in labels for labels in shown):
        styles["unassigned"] = (UNASSIGNED_COLOUR, "x")
    columns = -(-len(styles) // ROWS_OF_LEGEND)
    size = (3.6 * len(panels) + 2.8 * columns, 3.9)
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
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
    line = require("matplotlib.lines").Line2D
    handles = [
        line([], [], color=colour, marker=marker, linestyle="", markersize=6, label=shortened(name, 30))
        for name, (colour, marker) in styles.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        fontsize=8.5,
        ncols=columns,
        handletextpad=0.2,
    )
    if title:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def umap_of(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Places of cells in a picture, [cells, 2], by scanpy's UMAP (with this seed) of their vectors [cells, features].

    Up to three cells are returned on a line.
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
