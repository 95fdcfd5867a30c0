"""AnnData to .h5ad, complete or not at all, and copies of .h5ad files with columns and matrices added."""

import contextlib
import io
import os
import shutil
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd

from .disk_matrix import DiskMatrix
from .paths import atomic_path
from .read import row_blocks

# of data frames, as anndata writes them since 0.8
TABLE_VERSION = "0.2.0"


def atomic_write_h5ad(adata, path, overwrite=False, inputs=(), compression="gzip"):
    """Write an AnnData so that `path` is either untouched or complete.

    `inputs` are files that must not be overwritten in any case; `compression` is as h5py has it. An output that may not
    be written there is an `InputError`; a failed write, such as on a full disk, an `OSError` of one clear message.
    """
    if adata.isbacked:
        inputs = (*inputs, adata.filename)
    with atomic_path(path, overwrite, inputs) as temporary, _h5_file(temporary, "w") as file:
        for name, element in _elements(adata).items():
            anndata.io.write_elem(file, name, element, dataset_kwargs={"compression": compression})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def _elements(adata):
    """The parts of an AnnData in writing order; text columns as categories, which may have gaps."""
    elements = {name: getattr(adata, name).copy() for name in ("obs", "var")}
    for table in elements.values():
        adata.strings_to_categoricals(table)
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        elements[name] = dict(getattr(adata, name))
    if adata.X is not None:
        elements["X"] = adata.X
    if adata.raw is not None:
        elements["raw"] = adata.raw
    return elements


def atomic_copy_h5ad(source, path, obs=None, obsm=None, uns=None, stale=(), overwrite=False):
    """Copy an .h5ad file and add to the copy; X and all else stay as they are, and out of memory.

    Added or replaced are columns of `obs` (dict of str to array [cells]) and elements of `obsm` and `uns`; a
    `DiskMatrix` is copied in blocks. Columns of `obs` that are `stale` are taken away. Errors are those of
    `atomic_write_h5ad`.
    """
    with atomic_path(path, overwrite, inputs=(source,)) as temporary:
        shutil.copyfile(source, temporary)
        with _h5_file(temporary, "r+") as file:
            _add_elements(file, obs or {}, obsm or {}, uns or {}, stale)


def _add_elements(file, obs, obsm, uns, stale):
    if obs or stale:
        _add_columns(file, obs, stale)
    for group, elements in (("obsm", obsm), ("uns", uns)):
        if elements and group not in file:
            anndata.io.write_elem(file, group, {})
        for name, value in elements.items():
            write = _write_rows if isinstance(value, DiskMatrix) else anndata.io.write_elem
            write(file[group], name, value)


def _add_columns(file, columns, stale):
    """Add to `obs`, and take from it, without reading it: the names of a million cells alone take 100 MB."""
    table = file["obs"]
    if table.attrs.get("encoding-version") != TABLE_VERSION:
        whole = anndata.io.read_elem(table).drop(columns=list(stale))
        for name, values in columns.items():
            whole[name] = values
        anndata.io.write_elem(file, "obs", whole)
        return
    n_cells = count_rows(table)
    for name in stale:
        del table[name]
    for name, values in columns.items():
        values = values if isinstance(values, pd.Categorical) else np.asarray(values)
        if len(values) != n_cells:
            raise ValueError(f"{name} has {len(values)} values for {n_cells} cells")
        anndata.io.write_elem(table, name, values)
    kept = [name for name in table.attrs["column-order"] if name not in stale]
    table.attrs["column-order"] = list(dict.fromkeys([*kept, *columns]))


def count_rows(table):
    """Rows of a data frame in an open .h5ad file."""
    names = table[table.attrs["_index"]]
    # text that knows missing values is a group
    return len(names if isinstance(names, h5py.Dataset) else anndata.io.read_elem(names))


def _write_rows(group, name, rows):
    """A matrix as anndata writes it, a block of rows at a time."""
    if name in group:
        del group[name]
    dataset = group.create_dataset(name, shape=rows.shape, dtype=rows.dtype)
    for block in row_blocks(len(rows)):
        dataset[block] = rows[block]
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


@contextlib.contextmanager
def _h5_file(path, mode):
    """An h5py file whose failed writes surface once, after HDF5 has closed in peace."""
    with DeferredWriteErrorFile(path, "w+" if mode == "w" else mode) as raw:
        try:
            # slashes in keys, repeated names and the like are the input's; they are not ours to change
            with h5py.File(raw, mode) as file, warnings.catch_warnings(action="ignore"):
                yield file
        except Exception:
            # what HDF5 said after a failed write is only its echo
            if raw.error is None:
                raise
        if raw.error is not None:
            raise raw.error from None


class DeferredWriteErrorFile(io.FileIO):
    """A file that keeps its first failed write in `error` and behaves from then on as if nothing had failed.

    HDF5 answers a failed write with a storm of tracebacks and a crash at exit. So what cannot be written any more is
    kept in memory, for HDF5 reads its own metadata back. The file is lost by then and will be removed; what counts
    is that HDF5 comes to its end quietly.
    """

    def __init__(self, path, mode):
        super().__init__(path, mode)
        self.error = None
        # (place, bytes) of every write since the first that failed, and the length the file would have
        self._unwritten = []
        self._length = os.fstat(self.fileno()).st_size

    def write(self, data):
        view = memoryview(data).cast("B")
        start, done = self.tell(), 0
        try:
            while done < len(view) and self.error is None:
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
        if self.error is not None:
            self._unwritten.append((start, bytes(view)))
        self._length = max(self._length, start + len(view))
        self.seek(start + len(view))
        return len(view)

    def truncate(self, size=None):
        self._length = self.tell() if size is None else size
        try:
            return super().truncate(size) if self.error is None else size
        except OSError as error:
            self.error = error
            return size

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        start, done = self.tell(), 0
        while count := super().readinto(view[done:]):
            done += count
        # past the end are zeros, as HDF5's own driver has it, and not what lay in memory before
        view[done:] = bytes(len(view) - done)
        for place, data in self._unwritten:
            first, last = max(place, start), min(place + len(data), start + len(view))
            if first < last:
                view[first - start : last - start] = data[first - place : last - place]
        self.seek(start + len(view))
        return len(view)

    def seek(self, offset, whence=os.SEEK_SET):
        if whence == os.SEEK_END and self.error is not None:
            offset, whence = self._length + offset, os.SEEK_SET
        return super().seek(offset, whence)
