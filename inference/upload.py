"""Cells that somebody sent: refused if they are too many, annotated, and made into what a page shows."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata

from ..evaluation.embedding_plot import plot_embedding
from ..tokenization import InputError
from ..trained_model.loaded_model import LoadedModel, load_model
from .annotate_cells import annotate_file
from .query import opened
from .report import cell_coordinates, types_table


@dataclass(frozen=True)
class Limits:
    """What an upload may hold at most."""

    cells: int = 50_000
    megabytes: int = 500


@dataclass(frozen=True)
class Annotated:
    """
    What the page shows of annotated cells.

    Attributes
    ----------
    message
        Sentences in Markdown.
    columns, rows
        The table of types, of text.
    picture
        PNG with the cells on a plane; None where scanpy is not installed.
    path
        The annotated .h5ad.
    """

    message: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: Path | None
    path: Path


def annotate_upload(
    upload: str | Path,
    model: str | Path,
    folder: str | Path,
    limits: Limits | None = None,
    values: str = "auto",
) -> Annotated:
    """
    Annotate an uploaded file, and make what the page shows of it.

    Parameters
    ----------
    upload
        .h5ad or 10x .h5.
    model
        Model folder, or its name on the Hub.
    folder
        Where a folder for the results is made.
    limits
        Larger uploads are refused.
    values
        What the values are: ``"auto"``, ``"counts"`` or ``"log1p"``.

    Raises
    ------
    InputError
        When the upload is too large, or as `scbert.annotate`.

    Examples
    --------
    >>> annotate_upload("cells.h5ad", "my_model", "results").rows  # doctest: +SKIP
    [['B', '120', '17.1%', '0.931', '0.972'], ...]
    """
    upload = Path(upload)
    _check_size(upload, limits or Limits())
    results = Path(tempfile.mkdtemp(prefix="results-", dir=folder))
    path = results / f"{upload.stem}_annotated.h5ad"
    summary = annotate_file(upload, loaded_model(str(model)), path, input=values)
    cells = anndata.read_h5ad(path, backed="r")
    try:
        labels = cells.obs["scbert_cell_type"].astype(str).to_numpy()
        confidence = cells.obs["scbert_confidence"].to_numpy()
        table = types_table(labels, confidence)
        xy, chosen, source = cell_coordinates(cells, input=values)
    finally:
        cells.file.close()
    picture = None
    if xy is not None:
        picture = results / "cells.png"
        plot_embedding(xy, {"": labels[chosen]}, picture, title=f"{len(chosen):,} cells: {source}")
    return Annotated(_message(summary), table.columns, table.rows, picture, path)


def _check_size(upload: Path, limits: Limits) -> None:
    if upload.suffix.lower() not in (".h5ad", ".h5"):
        raise InputError(
            f"{upload.name} is no .h5ad and no .h5 file. Save your cells as .h5ad and upload that."
        )
    megabytes = upload.stat().st_size / 2**20
    if megabytes > limits.megabytes:
        raise InputError(
            f"The file has {megabytes:,.0f} MB; this page takes up to {limits.megabytes:,}. "
            "Upload a part of the cells, or run `scbert annotate` on your own machine."
        )
    with opened(upload) as cells:
        n_cells = cells.n_obs
    if n_cells > limits.cells:
        raise InputError(
            f"The file holds {n_cells:,} cells; this page takes up to {limits.cells:,}. "
            "Upload a part of them, or run `scbert annotate` on your own machine."
        )


@functools.lru_cache(maxsize=2)
def loaded_model(model: str) -> LoadedModel:
    """The model, kept for the next upload."""
    return load_model(model)


def _message(summary: dict[str, Any]) -> str:
    lines = [
        f"**{summary['cells']:,} cells annotated**, {summary['unassigned']:,} of them left unassigned. "
        f"{summary['genes_found']:,} of the model's {summary['genes_of_model']:,} genes were found.",
        *summary["notes"],
        "The file holds your cells as they were, with `obs['scbert_cell_type']` and `obs['scbert_confidence']` added.",
    ]
    return "\n\n".join(lines)
