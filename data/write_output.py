"""Outputs that appear under their final name only when complete.

A file is written beside its final place under a temporary name and moved; a folder is built as ``DIR.partial`` and
renamed.
"""

import contextlib
import errno
import glob
import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path

from ..tokenization import InputError
from .check_paths import check_output_folder, check_output_path

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_path(path, overwrite=False, inputs=()):
    """A temporary path beside `path`, moved to it when the block ends well and removed when it does not.

    Parameters
    ----------
    path, overwrite, inputs
        See `check_output_path`.

    Yields
    ------
    pathlib.Path
        To be written by the caller.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder) / "table.csv") as temporary:
    ...         _ = temporary.write_text("gene,score")
    ...     os.listdir(folder)
    ['table.csv']
    """
    path = check_output_path(path, overwrite, inputs)
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file is to be written. Choose another name.")
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
        raise failed_write(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path):
    """A binary file, open for writing, that takes the place of `path` when the block ends well."""
    with atomic_path(path, overwrite=True) as temporary, open(temporary, "wb") as handle:
        yield handle


def _temporary_prefix(final, process):
    """Name of a temporary file up to its random part: which output, which machine, which process."""
    return f".{final.name}.{socket.gethostname()}-{process}."


def _remove_stale(final):
    """Remove what processes of this machine left behind that were killed while they wrote this output."""
    import psutil

    mine = _temporary_prefix(final, "").removesuffix(".")
    for stale in final.parent.glob(f"{glob.escape(mine)}*{PARTIAL}"):
        process = stale.name.removeprefix(mine).split(".")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            stale.unlink(missing_ok=True)


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

    When the block fails, the partial folder stays, so that its checkpoints can be resumed.

    Parameters
    ----------
    path, overwrite, marker
        See `check_output_folder`.
    resume : bool
        Continue in an existing partial folder; otherwise it is removed first.

    Yields
    ------
    pathlib.Path
        The partial folder.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with partial_folder(Path(parent) / "model") as folder:
    ...         _ = (folder / "config.json").write_text("{}")
    ...     os.listdir(parent)
    ['model']
    """
    path = check_output_folder(path, overwrite, marker)
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists() and not resume:
        logger.warning(
            "Removing %s, left by an interrupted run (resume=True, or --resume, would have continued it).",
            partial,
        )
        shutil.rmtree(partial)
    try:
        partial.mkdir(exist_ok=True)
        yield partial
    except Exception as error:
        if not disk_is_full(error):
            raise
        full = failed_write(OSError(errno.ENOSPC, ""), path).strerror
        rest = f"What was finished is in {partial}: continue with resume=True, or --resume."
        raise OSError(errno.ENOSPC, f"{full} {rest}") from None
    _swap(partial, path)


def _swap(partial, path):
    """Put the finished folder in the place of an older one, which goes last."""
    if not path.exists():
        os.replace(partial, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.replace(path, old / path.name)
    os.replace(partial, path)
    shutil.rmtree(old)


def failed_write(error, path):
    """One sentence for the usual causes of a failed write, as an `OSError` with the number of the first."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and try again",
        errno.EDQUOT: "your disk quota is used up; free some space and try again",
        errno.EFBIG: "the file grew beyond the size allowed here (ulimit -f)",
        errno.EACCES: "the folder is not writable",
        errno.EROFS: "the file system is read-only",
    }
    reason = reasons.get(error.errno, error.strerror or str(error))
    return OSError(error.errno, f"Could not write {path}: {reason}. No incomplete output was left.")


def disk_is_full(error):
    """Whether a full disk or quota is behind an error: libraries report it in types and words of their own."""
    signs = ("no space left on device", "os error 28", "errno = 28", "disk quota exceeded")
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False
