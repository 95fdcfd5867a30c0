"""
Paths of cells and of outputs: looked at before any work is done, and outputs there only when complete.

A file is written beside its final place under a temporary name and moved; a folder is built as ``DIR.partial`` and
renamed. Only the standard library is imported here, so that a command refuses a wrong path at once.
"""

import contextlib
import errno
import glob
import json
import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path

from ..tokenization import InputError

try:
    import fcntl
# where there is no such module nothing is locked
except ImportError:
    fcntl = None

logger = logging.getLogger(__name__)

# what annotated cells are written as: with all they came with, or the new columns alone
ANNOTATION_FORMATS = (".h5ad", ".csv")
OTHER_FORMATS = (".csv", ".tsv", ".txt", ".gz", ".mtx", ".loom", ".rds")
PARTIAL = ".partial"
# stands in every folder while it is built: such a one may be removed
MARK = ".scbert-partial"
RESUMABLE = " (resume=True, or --resume, would have continued it)"


def check_cells_path(path):
    """The path, refused if nothing is there or it cannot hold cells, as far as its name and place tell."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"Cells are an AnnData, or the path of a file; found a {type(path).__name__}. Make an AnnData of it, with "
            "the genes as its var_names: anndata.AnnData(...)."
        )
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is no file {path}.")
    if path.is_dir():
        if not (is_zarr(path) or is_10x_folder(path)):
            raise InputError(_not_a_folder_of_cells(path))
    elif path.stat().st_size == 0:
        raise InputError(f"{path} is empty.")
    elif path.name.lower().endswith((".h5ad.gz", ".h5.gz", ".h5mu.gz")):
        raise InputError(f"{path} is compressed as a whole. Unpack it first: gunzip -k {path}")
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
    return any(path.name.removesuffix(".gz").endswith("matrix.mtx") for path in visible(folder))


def visible(folder):
    """What is in a folder, sorted, without hidden files: macOS puts a ._matrix.mtx beside a matrix.mtx."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


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


def stamp_of(path):
    """Size and times of the last change of a file, or of all in a folder: another one of its name has others."""
    if not path.exists():
        return []
    facts = [part.stat() for part in (path.rglob("*") if path.is_dir() else [path])]
    return [sum(fact.st_size for fact in facts), sum(fact.st_mtime_ns for fact in facts)]


def check_output_path(path, overwrite=False, inputs=(), suffix=None, outputs=()):
    """Refuse an output, file or folder, that exists, cannot be written, or is one of the `inputs` or other `outputs`.

    No `overwrite` lets an input be written. The name has to end in `suffix`, or one of several, if that is given.
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
    for other in outputs:
        if other is not None and _same_file(path, Path(other)):
            raise InputError(f"Two outputs have one name, {path}. Give each its own.")
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

    Its partial folder may be there if a run left it. The path comes back absolute, with links in it as they are.
    """
    path = Path(os.path.abspath(path))
    check_output_path(path, overwrite)
    partial_of(path)
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


def partial_of(output):
    """The partial folder of an output; what is in its place is refused, unless it is an empty folder or a run's."""
    output = Path(output)
    folder = output.with_name(output.name + PARTIAL)
    ours = folder.is_dir() and not folder.is_symlink()
    ours = ours and ((folder / MARK).is_file() or not any(folder.iterdir()))
    if os.path.lexists(folder) and not ours:
        raise InputError(
            f"{folder} is in the place where the output is built, and no interrupted run left it (there is no {MARK} "
            f"in it), so it is neither used nor removed. Move it, or choose another output (--output)."
        )
    return folder


@contextlib.contextmanager
def take_partial_folder(output, overwrite, resume):
    """The partial folder of an output, made, or emptied unless `resume`, for a block that keeps others out of it.

    An `InputError` where another process works in it, or has written the output meanwhile.
    """
    folder = partial_of(output)
    folder.mkdir(exist_ok=True)
    with open(folder / MARK, "a") as lock:
        try:
            # where there are no locks, a folder with an open file could not be moved
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else lock.close()
        except BlockingIOError:
            raise InputError(
                f"Another process is writing this output: it works in {folder}. Wait for its end, or choose another "
                "output (--output)."
            ) from None
        # not every file system knows locks
        except OSError:
            logger.debug("%s cannot be locked", folder)
        try:
            # of a run that ended after the output was looked for
            if os.path.lexists(output) and not overwrite and os.listdir(folder) == [MARK]:
                shutil.rmtree(folder, ignore_errors=True)
            check_output_path(output, overwrite)
            if not resume:
                _empty(folder, "" if resume is None else RESUMABLE)
            yield folder
        finally:
            # at once, though a process that was forked has the file open, too
            if fcntl:
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)


def _empty(folder, hint):
    left = [path for path in folder.iterdir() if path.name != MARK]
    if left:
        logger.warning("Removing what an interrupted run left in %s%s.", folder, hint)
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def atomic_path(path, overwrite=False, inputs=()):
    """A temporary path beside `path`, moved to it when the block ends well and removed when it does not.

    The arguments are those of `check_output_path`.
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
        # brought to the disk before it is moved: a crash must not leave an empty one
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
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


@contextlib.contextmanager
def partial_folder(path, overwrite=False, resume=None, marker="config.json"):
    """Build a folder as ``DIR.partial``; rename it to ``DIR`` when the block ends well.

    When the block fails, the partial folder stays, so that its checkpoints can be resumed: with `resume`; without, it
    is emptied first. Of what cannot be resumed, None, nothing stays. The other arguments are those of
    `check_output_folder`.
    """
    path = check_output_folder(path, overwrite, marker)
    with take_partial_folder(path, overwrite, resume) as partial:
        try:
            yield partial
        except BaseException as error:
            rest = f" What was finished is in {partial}: continue with resume=True, or --resume."
            if resume is None:
                shutil.rmtree(partial, ignore_errors=True)
                rest = ""
            if not disk_is_full(error):
                raise
            full = failed_write(OSError(errno.ENOSPC, ""), path).strerror
            raise OSError(errno.ENOSPC, full + rest) from None
        # while nobody else may empty it
        _swap(partial, path)
        (path / MARK).unlink()


def keep_record(path, facts):
    """Record in a partial folder what it is begun with, as JSON; refuse to go on where that was something else."""
    if not path.exists():
        with atomic_file(path) as handle:
            handle.write(json.dumps(facts).encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *facts} if before.get(name) != facts.get(name))
    if changed:
        one = min(changed, key=len)
        raise InputError(
            f"{path.parent} was begun with other settings or files ({', '.join(changed)}): {one} was "
            f"{before.get(one)!r} and is {facts.get(one)!r} now. Use the same ones to continue, or start again without "
            "resuming (resume=False, or no --resume)."
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
        by_number = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if by_number or any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False
