"""An .h5ad file opened without loading it: var in memory, columns of obs and every matrix left on disk.

anndata's own backed mode keeps X on disk and still loads obs, layers, obsm and obsp, so that memory grows with the
cells; its lazy reader needs xarray and dask.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import pandas as pd

from ..tokenization import select_matrix
from .read import read_cells
from .write_h5ad import TABLE_VERSION, count_rows

MATRICES = {"array", "csr_matrix", "csc_matrix"}


def open_cells(path, layer=None, any_matrix=False):
    """
    Open cells with as little in memory as their format allows.

    An .h5ad stays on disk, as `BackedCells`, to be closed by ``file.close()``; any other format of `read_cells` is read
    into memory. That there is the `layer`, or ``"raw"``, is checked here, unless `any_matrix` will do; errors are those
    of `read_cells`.
    """
    try:
        cells = BackedCells(path)
    # of another format, older, or damaged: read_cells reads it or says what is wrong
    except Exception:
        return read_cells(path, layer=layer, backed=True, check=False)
    try:
        if cells.n_obs == 0 or cells.n_vars == 0:
            return read_cells(path, layer=layer, backed=True)
        if not any_matrix:
            select_matrix(cells, layer)
    except BaseException:
        cells.file.close()
        raise
    return cells


class BackedCells:
    """
    What reading cells needs of an AnnData, over an open .h5ad file as anndata has written it since 0.8.

    `obs` maps the names of the columns in order to Series without the names of the cells; they and `obs_names` are read
    when they are asked for. `var` is in memory; X, `layers`, `obsm` and the X of `raw` stay on disk until a part of
    them is taken. `file` is to be closed.
    """

    isbacked = True

    def __init__(self, path: str | Path):
        self.file = h5py.File(path, "r")
        try:
            if "mod" in self.file:
                raise TypeError("the matrices of a MuData are those of its modalities")
            self.obs = _Columns(self.file["obs"])
            self.var = anndata.io.read_elem(self.file["var"])
            self.n_obs, self.n_vars, self.var_names = self.obs.n_rows, len(self.var), self.var.index
            self.X = _matrix(self.file["X"]) if "X" in self.file else None
            self.layers, self.obsm = (_matrices(self.file.get(name, {})) for name in ("layers", "obsm"))
            self.raw = _raw(self.file["raw"]) if "raw" in self.file else None
        except BaseException:
            self.file.close()
            raise

    @property
    def obs_names(self):
        """Names of the cells, read when asked for."""
        return self.obs.index()


class _Columns(Mapping):
    """Columns of a data frame by name, read when asked for."""

    def __init__(self, group):
        if group.attrs["encoding-type"] != "dataframe" or group.attrs["encoding-version"] != TABLE_VERSION:
            raise TypeError(f"the encoding of {group.name} is not that of a data frame, or too old")
        self._group, self._names = group, [str(name) for name in group.attrs["column-order"]]
        self.n_rows = count_rows(group)

    def __getitem__(self, name):
        if name not in self._names:
            raise KeyError(name)
        return pd.Series(anndata.io.read_elem(self._group[name]), name=name)

    def index(self):
        """Names of the rows."""
        return pd.Index(anndata.io.read_elem(self._group[self._group.attrs["_index"]]))

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def _matrix(element):
    """A matrix on disk that gives its rows by slice."""
    if element.attrs.get("encoding-type") not in MATRICES:
        raise TypeError(f"the encoding of {element.name} is not that of a matrix")
    return element if isinstance(element, h5py.Dataset) else anndata.io.sparse_dataset(element)


def _matrices(group):
    """The matrices of a group; what is none, such as a data frame of obsm, is left out."""
    known = [name for name in group if group[name].attrs.get("encoding-type") in MATRICES]
    return {name: _matrix(group[name]) for name in known}


def _raw(group):
    var = anndata.io.read_elem(group["var"])
    return SimpleNamespace(X=_matrix(group["X"]), var=var, var_names=var.index)
