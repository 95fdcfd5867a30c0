"""Where the cells of a corpus come from: files, folders of files, or a manifest table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..tokenization import InputError
from .paths import is_10x_folder, visible

CELL_FILES = (".h5ad", ".h5", ".h5mu", ".zarr")
TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Source:
    """One file of cells."""

    path: Path
    # that holds the values, "raw", or None for X
    layer: str | None = None
    # what a manifest says of all its cells: dataset, donor, species and the like
    columns: dict[str, str] = field(default_factory=dict)


def find_sources(paths, layer=None):
    """The files named by `paths`, in order.

    They may be files of cells, folders of them, and manifests: a .csv or .tsv table with a column ``path`` (relative to
    the table), ``layer`` if needed (else it is `layer`), and any further columns (``dataset``, ``donor``, ``species``),
    which are recorded with each cell of the file. None may be named twice.
    """
    sources = []
    for path in map(Path, paths):
        if path.suffix in TABLES:
            sources += _read_manifest(path, layer)
        elif path.is_dir() and path.suffix != ".zarr" and not is_10x_folder(path):
            sources += [Source(found, layer) for found in files_in(path)]
        else:
            sources.append(Source(path, layer))
    seen = set()
    for source in sources:
        key = (source.path.resolve(), source.layer)
        if key in seen:
            raise InputError(f"{source.path} is listed twice among the sources; list it once.")
        seen.add(key)
    return sources


def files_in(folder):
    """Files of cells and 10x folders in a folder, by name; an `InputError` if there are none."""
    inside = visible(folder)
    found = [path for path in inside if path.suffix in CELL_FILES or (path.is_dir() and is_10x_folder(path))]
    if not found:
        raise InputError(f"{folder} contains no file of cells (*{', *'.join(CELL_FILES)}, or a 10x folder).")
    return found


def _read_manifest(path, layer):
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str)
    except (OSError, ValueError) as error:
        raise InputError(f"The manifest {path} cannot be read as a table ({error}).") from error
    if "path" not in table or table["path"].isna().any() or table.empty:
        raise InputError(
            f"The manifest {path} needs a column 'path' that names a file in every row; its columns are: "
            f"{', '.join(map(str, table.columns))}."
        )
    sources = []
    for row in table.to_dict("records"):
        known = {name: value for name, value in row.items() if isinstance(value, str) and value}
        # a path joined to an absolute one is the latter
        file = path.parent / known.pop("path")
        sources.append(Source(file, known.pop("layer", layer), known))
    return sources
