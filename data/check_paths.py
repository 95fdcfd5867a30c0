"""Paths of inputs and outputs, looked at before any work is done.

Only the standard library is imported here, so that a command refuses a wrong path at once.
"""

import os
from pathlib import Path

from ..tokenization import InputError

# what annotated cells are written as: with all they came with, or the new columns alone
ANNOTATION_FORMATS = (".h5ad", ".csv")
OTHER_FORMATS = (".csv", ".tsv", ".txt", ".gz", ".mtx", ".loom", ".rds")


def check_cells_path(path):
    """The path, refused if it cannot hold cells, as far as its name and place tell.

    Raises
    ------
    InputError
        If there is nothing, nothing in it, or a format that is not read here. Of a folder that holds cells further
        down, the message names where.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no file {path}.")
    if path.is_dir():
        if not (is_zarr(path) or is_10x_folder(path)):
            raise InputError(_not_a_folder_of_cells(path))
    elif path.stat().st_size == 0:
        raise InputError(f"{path} is empty.")
    elif path.suffix.lower() in OTHER_FORMATS:
        raise InputError(
            f"{path}: {path.suffix} files are not read here. Convert it to .h5ad (for example with "
            f"scanpy.read(...).write_h5ad(...)), or give the folder that holds a 10x matrix.mtx."
        )
    return path


def is_zarr(folder):
    """Whether a folder is a zarr store, by its name or by its contents."""
    return folder.suffix == ".zarr" or any((folder / name).exists() for name in (".zgroup", "zarr.json"))


def is_10x_folder(folder):
    """Whether a folder holds a matrix.mtx or matrix.mtx.gz."""
    return any(path.name.removesuffix(".gz").endswith("matrix.mtx") for path in Path(folder).iterdir())


def _not_a_folder_of_cells(folder):
    below = list(dict.fromkeys(str(path) for path in _cells_below(folder)))
    if below:
        rest = f" and {len(below) - 4} more" if len(below) > 4 else ""
        return f"{folder} is a folder above the cells. Give what is in it: {', '.join(below[:4])}{rest}."
    return f"{folder} is a folder without a 10x matrix.mtx or a zarr store in it; an .h5ad file was needed."


def _cells_below(folder):
    # Cell Ranger writes SAMPLE/outs/filtered_feature_bc_matrix/matrix.mtx.gz
    for below in ("", "*/", "*/*/"):
        for pattern in ("*matrix.mtx", "*matrix.mtx.gz"):
            yield from (path.parent for path in sorted(folder.glob(below + pattern)))
        for pattern in ("*.h5ad", "*matrix.h5"):
            yield from sorted(folder.glob(below + pattern))


def check_output_path(path, overwrite=False, inputs=(), suffix=None):
    """Refuse an output that exists, cannot be written, or is an input.

    Parameters
    ----------
    path : str or os.PathLike
        Output file or folder.
    overwrite : bool
        Accept an existing one.
    inputs : sequence of path
        Files the command reads; none of them may be the output, whatever `overwrite` says.
    suffix : str or tuple of str, optional
        How the name has to end, such as ``".h5ad"``.
    """
    path = Path(path)
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(
            f"The output {path} must be named {' or '.join(suffixes)}: other formats are not written."
        )
    for source in inputs:
        if source is not None and _same_file(path, Path(source)):
            raise InputError(f"The output {path} is the input itself. Choose another output (--output).")
    # a dangling link exists too: os.replace would take its place without a word
    if os.path.lexists(path) and not overwrite:
        raise InputError(
            f"{path} already exists. Choose another name, or replace it (overwrite=True, or --overwrite)."
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"The folder {parent} of the output does not exist. Create it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"The folder {parent} of the output is not writable.")
    return path


def _same_file(path, source):
    if path.exists() and source.exists():
        return path.samefile(source)
    return path.resolve() == source.resolve()


def check_output_folder(path, overwrite=False, marker="config.json"):
    """Like `check_output_path` for a folder; one that exists may be replaced only if it is empty or holds `marker`.

    Returns
    -------
    pathlib.Path
        Absolute, with links in it as they are.
    """
    path = Path(os.path.abspath(path))
    check_output_path(path, overwrite)
    if not os.path.lexists(path):
        return path
    if not path.is_dir() or path.is_symlink():
        raise InputError(f"{path} is a file or a link, and a folder is to be written. Choose another name.")
    if any(path.iterdir()) and not (path / marker).is_file():
        raise InputError(
            f"{path} holds other files (there is no {marker} in it), so it is never replaced, not even when "
            f"overwriting was asked for. Choose another name, or remove it yourself."
        )
    return path
