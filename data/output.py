"""Outputs that appear under their final name only when complete.

A file is written beside its final place under a temporary name and moved; a folder is built as
``DIR.partial`` and renamed. HDF5 never sees a full disk: `PatientFile` keeps the error for us, because
h5py answers a failed write with a storm of tracebacks and a crash at exit.
"""

import contextlib
import errno
import glob
import logging
import os
import shutil
import socket
import tempfile
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil

from ..tokenization import InputError
from .failed_writes import PatientFile, explain
from .row_file import RowFile, row_blocks

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
# of data frames, as anndata writes them since 0.8
TABLE_VERSION = "0.2.0"


def check_output_path(path, overwrite=False, inputs=()):
    """Refuse an output that exists, cannot be written, or is an input; before any work is done.

    Parameters
    ----------
    path : str or os.PathLike
        Output file or folder.
    overwrite : bool
        Accept an existing one.
    inputs : sequence of path
        Files the command reads; none of them may be the output, whatever `overwrite` says.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    InputError
    """
    path = Path(path)
    for source in inputs:
        if source is not None and _same_file(path, Path(source)):
            raise InputError(f"The output {path} is the input itself; give another name with --output.")
    # a dangling link exists too: os.replace would take its place without a word
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already. Give another name, or --overwrite to replace it.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"The folder {parent} of the output does not exist; make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"The folder {parent} of the output is not writable.")
    return path


def _same_file(path, source):
    if path.exists() and source.exists():
        return path.samefile(source)
    return path.resolve() == source.resolve()


@contextlib.contextmanager
def atomic_path(path, overwrite=False, inputs=()):
    """A temporary path beside `path`, moved to it when the block ends well and removed when it does not.

    Yields
    ------
    pathlib.Path
        To be written by the caller.

    Examples
    --------
    >>> with atomic_path("table.csv", overwrite=True) as temporary:
    ...     _ = temporary.write_text("gene,score")
    """
    path = check_output_path(path, overwrite, inputs)
    if path.is_dir():
        raise InputError(f"{path} is a folder; the output is a file.")
    # os.replace on a link would replace the link, not the file it names
    final = path.resolve()
    _remove_stale(final)
    handle, temporary = tempfile.mkstemp(
        prefix=_temporary_prefix(final, os.getpid()), suffix=PARTIAL, dir=final.parent
    )
    os.close(handle)
    temporary = Path(temporary)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, final)
    except OSError as error:
        raise explain(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_prefix(final, process):
    """Name of a temporary file up to its random part: which output, which machine, which process."""
    return f".{final.name}.{socket.gethostname()}-{process}."


def _remove_stale(final):
    """Remove what processes of this machine left that were killed while they wrote this output."""
    mine = _temporary_prefix(final, "").removesuffix(".")
    for stale in final.parent.glob(f"{glob.escape(mine)}*{PARTIAL}"):
        process = stale.name.removeprefix(mine).split(".")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            stale.unlink(missing_ok=True)


def atomic_write_h5ad(adata, path, overwrite=False, inputs=(), compression="gzip"):
    """Write an AnnData so that `path` is either untouched or complete.

    Parameters
    ----------
    adata : anndata.AnnData
    path : str or os.PathLike
    overwrite : bool
        Replace an existing file.
    inputs : sequence of path
        Files that must not be overwritten in any case.

    Raises
    ------
    InputError
        If the output may not be written there.
    OSError
        If writing failed, such as on a full disk: one clear message.
    """
    if adata.isbacked:
        inputs = (*inputs, adata.filename)
    with atomic_path(path, overwrite, inputs) as temporary, _h5_file(temporary, "w") as file, _quiet():
        for name, element in _elements(adata).items():
            anndata.io.write_elem(file, name, element, dataset_kwargs={"compression": compression})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


@contextlib.contextmanager
def _quiet():
    """Slashes in keys, repeated names and the like are the input's; they are not ours to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def atomic_copy_h5ad(source, path, obs=None, obsm=None, uns=None, overwrite=False):
    """Copy an h5ad file and add to the copy; X and all else stay as they are, and out of memory.

    Parameters
    ----------
    source : str or os.PathLike
        Existing .h5ad file, left untouched.
    path : str or os.PathLike
        Output.
    obs : dict of str to array [cells], optional
        Columns to add to (or replace in) `obs`.
    obsm, uns : dict, optional
        Elements to add or replace; a `RowFile` is copied in blocks.
    """
    with atomic_path(path, overwrite, inputs=(source,)) as temporary:
        shutil.copyfile(source, temporary)
        with _h5_file(temporary, "r+") as file, _quiet():
            _add_elements(file, obs or {}, obsm or {}, uns or {})


def _add_elements(file, obs, obsm, uns):
    if obs:
        _add_columns(file, obs)
    for group, elements in (("obsm", obsm), ("uns", uns)):
        if elements and group not in file:
            anndata.io.write_elem(file, group, {})
        for name, value in elements.items():
            if isinstance(value, RowFile):
                _write_rows(file[group], name, value)
            else:
                anndata.io.write_elem(file[group], name, value)


def _add_columns(file, columns):
    """Add to `obs` without reading it: the names of a million cells alone take 100 MB."""
    table = file["obs"]
    if table.attrs.get("encoding-version") != TABLE_VERSION:
        whole = anndata.io.read_elem(table)
        for name, values in columns.items():
            whole[name] = values
        anndata.io.write_elem(file, "obs", whole)
        return
    n_cells = count_rows(table)
    for name, values in columns.items():
        values = values if isinstance(values, pd.Categorical) else np.asarray(values)
        if len(values) != n_cells:
            raise ValueError(f"{name} has {len(values)} values for {n_cells} cells")
        anndata.io.write_elem(table, name, values)
    table.attrs["column-order"] = list(dict.fromkeys([*table.attrs["column-order"], *columns]))


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
    with open(path, "w+b" if mode == "w" else "r+b", buffering=0) as raw:
        patient = PatientFile(raw)
        try:
            with h5py.File(patient, mode) as file:
                yield file
        except Exception:
            # what HDF5 said after a failed write is only its echo
            if patient.error is None:
                raise
            raise patient.error from None
        if patient.error is not None:
            raise patient.error


def _sync(path):
    """Bring the file to the disk before it is moved: a crash must not leave an empty one."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def partial_folder(path, overwrite=False, resume=False, marker="config.json"):
    """Build a folder as ``DIR.partial``; rename it to ``DIR`` when the block ends well.

    When the block fails the partial folder stays, so that its checkpoints can be resumed.

    Parameters
    ----------
    path : str or os.PathLike
        Final name.
    overwrite : bool
        Replace an existing folder, if it holds `marker`: nothing else is ever removed.
    resume : bool
        Go on in an existing partial folder; otherwise it is removed first.
    marker : str
        File by which a folder is known as one of ours.

    Yields
    ------
    pathlib.Path
        The partial folder.

    Examples
    --------
    >>> with partial_folder("model", overwrite=True) as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    """
    path = Path(os.path.abspath(path))
    check_output_folder(path, overwrite, marker)
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists() and not resume:
        logger.warning("Removing %s, left by an interrupted run (--resume would continue it).", partial)
        shutil.rmtree(partial)
    try:
        partial.mkdir(exist_ok=True)
        yield partial
    except Exception as error:
        if _disk_is_full(error):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise OSError(
                errno.ENOSPC, f"{explain(full, path).strerror} What was finished is in {partial} (--resume)."
            ) from None
        raise
    _swap(partial, path)


def _disk_is_full(error):
    """torch and safetensors report a full disk in types and words of their own."""
    signs = ("no space left on device", "os error 28", "disk quota exceeded")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        sign in str(error).lower() for sign in signs
    )


def check_output_folder(path, overwrite=False, marker="config.json"):
    """Refuse an output folder that exists, unless it may be replaced; see `partial_folder`."""
    path = Path(os.path.abspath(path))
    check_output_path(path, overwrite)
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise InputError(f"{path} is not a folder of its own; give another name.")
    if any(path.iterdir()) and not (path / marker).is_file():
        raise InputError(
            f"{path} holds other things (there is no {marker} in it), so it is not replaced even with "
            f"--overwrite; give another name or remove it yourself."
        )


def _swap(partial, path):
    """Put the finished folder in the place of an older one, which goes last."""
    if not path.exists():
        os.replace(partial, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.replace(path, old / path.name)
    os.replace(partial, path)
    shutil.rmtree(old)
