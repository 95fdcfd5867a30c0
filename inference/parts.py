"""What a command adds to its cells, ``{"obs": ..., "obsm": ..., "uns": ...}``: where it is kept and how written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.disk_matrix import DiskMatrix
from ..data.read_backed import BackedCells
from ..data.write_h5ad import atomic_copy_h5ad, atomic_write_h5ad
from ..data.write_output import atomic_path

# makes a matrix of float32 zeros of a shape
NewRows = Callable[[tuple[int, int]], np.ndarray | DiskMatrix]


def rows_in_memory(shape: tuple[int, int]) -> np.ndarray:
    """A float32 matrix of zeros."""
    return np.zeros(shape, dtype=np.float32)


def rows_for(adata: AnnData | BackedCells, output: str | Path) -> NewRows:
    """Where the results of all cells are kept until they are written: on disk, if that is where the cells are."""
    return partial(DiskMatrix, output=output) if adata.isbacked else rows_in_memory


def add_parts(adata: AnnData, parts: dict[str, dict]) -> None:
    """Put ``{"obs": ..., "obsm": ..., "uns": ...}`` into an AnnData."""
    for slot, elements in parts.items():
        target = getattr(adata, slot)
        for name, value in elements.items():
            target[name] = value


def write_parts(query, adata: AnnData, parts: dict[str, dict], output, overwrite: bool) -> None:
    """Write the query with `parts` added, or a .csv of the columns of `obs` alone; complete or not at all."""
    if Path(output).suffix.lower() == ".csv":
        with atomic_path(output, overwrite, inputs=(query,)) as temporary:
            pd.DataFrame(parts["obs"], index=adata.obs_names).to_csv(temporary, index_label="cell")
        return
    if adata.isbacked:
        # the handle must not stand open on a file that is copied
        adata.file.close()
        atomic_copy_h5ad(query, output, **parts, overwrite=overwrite)
        return
    add_parts(adata, parts)
    atomic_write_h5ad(adata, output, overwrite=overwrite, inputs=(query,))
