"""The frame around every verb of the command line: messages, exit codes, signals, the JSON line.

Exit codes: 0 done, 1 a problem named in one paragraph on stderr, 2 wrong usage, 130 and 143 stopped by
Ctrl-C and by SIGTERM. ``SCBERT_DEBUG=1`` shows tracebacks and the libraries' own messages.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..extras import EXTRAS, MissingLibrary, how_to_install

_QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_STOPPED = {130: "Stopped by Ctrl-C", 143: "Stopped by SIGTERM"}


def debugging() -> bool:
    """Whether ``SCBERT_DEBUG`` asks for tracebacks and the libraries' own messages."""
    return os.environ.get("SCBERT_DEBUG", "0") not in ("", "0")


def say(message: str, style: str = "") -> None:
    """Write one message to stderr, unwrapped where stderr is not a terminal."""
    console = Console(stderr=True, highlight=False)
    console.print(escape(message), style=style, soft_wrap=not console.is_terminal)


def silence_libraries() -> None:
    """Keep transformers, datasets and the hub client from printing; call before they are imported."""
    if debugging():
        return
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)


class _SayHandler(logging.Handler):
    """Writes our own log records as messages, warnings in yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), style="yellow" if record.levelno >= logging.WARNING else "")


def show_messages() -> None:
    """Let what the package logs, from INFO on, appear on stderr."""
    ours = logging.getLogger("scbert")
    ours.setLevel(logging.INFO)
    if not any(isinstance(handler, _SayHandler) for handler in ours.handlers):
        ours.addHandler(_SayHandler())


def run(
    job: Callable[..., Mapping[str, Any] | None],
    /,
    *,
    json: bool = False,
    listing: bool = True,
    **options: Any,
) -> None:
    """Run ``job`` and print the summary it returns, unless the job has told it in words (``listing=False``).

    Options that are None are left out, so that the job's own defaults (or its recipe's) hold. What the
    job prints goes to stderr: stdout holds the JSON line and nothing else.
    """
    values = {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}
    given = {name: value for name, value in values.items() if value is not None}
    if not gc.isenabled():
        # the libraries stay: their objects need not be looked through again
        gc.freeze()
        gc.enable()
    with contextlib.redirect_stdout(sys.stderr):
        summary = plain(dict(job(**given) or {}))
    if json:
        print(dumps(summary, ensure_ascii=False, allow_nan=False), flush=True)
        return
    for name, value in summary.items() if listing else ():
        if isinstance(value, str | int | float):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            say(f"{name.replace('_', ' ')}: {shown}")


def plain(value: Any) -> Any:
    """Turn a summary into what JSON can hold: numpy and paths converted, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def guarded(command: Callable[[], Any]) -> int:
    """Call ``command`` (which may raise ``SystemExit``) and return the process's exit code."""
    try:
        with _terminable():
            command()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        message = explain(error)
        if message is None or debugging():
            traceback.print_exception(error)
        if message is not None:
            say(f"Error: {message}", style="red")
        return 1
    else:
        code = 0
    if code in _STOPPED:
        say(f"{_STOPPED[code]}. No incomplete output was left.", style="yellow")
    return code


def explain(error: Exception) -> str | None:
    """Return the paragraph a user needs to mend ``error``, or None where it is a bug of ours."""
    # imported here: nothing is slow to fail
    from ..data.paths import disk_is_full

    if disk_is_full(error):
        where = getattr(error, "filename", None)
        return (
            f"The disk is full{f' ({where})' if where else ''}: the output could not be written and nothing "
            "incomplete was left under its name. Free some space, or choose an --output on another disk."
        )
    if isinstance(error, OSError):
        if error.strerror and error.filename:
            return f"{error.strerror}: {error.filename}"
        return str(error) or type(error).__name__
    if isinstance(error, ValueError):
        from ..tokenization import InputError

        # by its name: its module would import torch
        mendable = isinstance(error, InputError) or type(error).__name__ == "BackendError"
        return str(error) if mendable else None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        package = error.name.partition(".")[0]
        return f"This needs {package}, which is not installed: {how_to_install(package)}"
    if isinstance(error, MissingLibrary):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"Out of memory: try a smaller --batch-size. ({error})"
    return None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), so that context managers remove their partial files."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(signum: int, frame: Any) -> None:
        if os.getpid() == owner:
            raise SystemExit(128 + signum)
        # a forked worker has nothing to clean: it dies the ordinary way
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def existing(*paths: Path | None) -> None:
    """Raise FileNotFoundError for a path that is given and not there, before the slow imports begin."""
    for path in paths:
        if path is not None and not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
