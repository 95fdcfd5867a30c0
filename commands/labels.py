"""The verb that brings the labels of a reference to the terms of the Cell Ontology."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data.paths import check_cells_path, check_output_path
from .console import run
from .options import Json, LabelKey, Overwrite


def map_labels(
    reference: Annotated[
        Path, typer.Argument(metavar="REF", help="Labelled cells: .h5ad, 10x .h5, .zarr.", show_default=False)
    ],
    label_key: LabelKey,
    output: Annotated[
        Path, typer.Option(metavar="FILE.csv", help="The table to write, and to correct.", show_default=False)
    ],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Propose terms of the Cell Ontology for the labels, in a table to correct."""
    given = locals()
    check_cells_path(reference)
    check_output_path(output, overwrite, inputs=(reference,), suffix=".csv")
    from ..data.cell_ontology import map_labels as job

    run(job, listing=False, **given)
