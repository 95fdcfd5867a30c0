"""
Who does a job: backends stand in tables, one function chooses, one variable and one context manager have a say.

The first backend of a table that pays and serves what is given does the job. ``SCBERT_BACKEND``, which child processes
inherit, and `favor_backend` name those that have to ("naive"), or with a minus those that must not ("-compiled");
several are separated by commas. The reasons of a choice are logged once each, at the level DEBUG.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

VARIABLE = "SCBERT_BACKEND"
# of attention: naive, chunked, triton; of whole blocks: plain, chunked, compiled, cuda; of products on a CPU: onednn
NAMES = ("naive", "plain", "chunked", "compiled", "triton", "cuda", "onednn")
# what backends of the package and the code of a checkpoint, which may be older, expect of each other
CONTRACT = 1

_asked = ContextVar("asked", default=None)


class BackendError(ValueError):
    """A backend was asked for that does not exist or cannot serve; the message says why, and what would do."""


@dataclass(frozen=True)
class Backend:
    """One way to do a job."""

    # called with what is given; the reason why this backend cannot serve it, or None
    supports: Callable[..., str | None]
    # does the job
    run: Callable[..., Any]
    # called likewise, unless the backend was asked for by name; the reason why it would not pay, or None
    worthwhile: Callable[..., str | None] = lambda *_: None


@contextmanager
def favor_backend(*names: str) -> Iterator[None]:
    """
    Have a say in which backends run FAVOR+ within a ``with`` block; hold it over the backward pass too.

    Parameters
    ----------
    *names
        As in ``SCBERT_BACKEND``, which they replace: those to use, with a minus those not to use. None: as if the
        variable were not set.

    Raises
    ------
    BackendError
        For a name that is none; and within the block, where a backend that was named cannot serve.

    Examples
    --------
    >>> with favor_backend("naive"):
    ...     is_wanted("naive"), is_wanted("chunked")
    (True, False)
    """
    token = _asked.set(_parse(",".join(names)))
    try:
        yield
    finally:
        _asked.reset(token)


@functools.lru_cache
def _parse(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names to use and names not to use."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name.removeprefix("-") not in NAMES]
    if unknown:
        raise BackendError(
            f"{VARIABLE} names {', '.join(unknown)}; known are {', '.join(NAMES)}, each with or without a minus."
        )
    unwanted = frozenset(name[1:] for name in names if name.startswith("-"))
    return frozenset(name for name in names if not name.startswith("-")), unwanted


def _request() -> tuple[frozenset[str], frozenset[str]]:
    asked = _asked.get()
    return _parse(os.environ.get(VARIABLE, "")) if asked is None else asked


def is_wanted(name: str) -> bool:
    """Whether a backend was asked for by name."""
    return name in _request()[0]


def is_unwanted(name: str) -> bool:
    """Whether a backend was forbidden by name."""
    return name in _request()[1]


def select(table: dict[str, Backend], *given: Any) -> str:
    """
    Name of the first backend of a table that serves what is given; a `BackendError` with the reasons if none does.

    Examples
    --------
    >>> fast = Backend(lambda x: "the number is odd" if x % 2 else None, lambda x: x >> 1)
    >>> slow = Backend(lambda x: None, lambda x: x / 2)
    >>> select({"compiled": fast, "naive": slow}, 3)
    'naive'
    """
    wanted, unwanted = _request()
    asked = wanted & table.keys()
    reasons = []
    for name, backend in table.items():
        if asked and name not in asked:
            continue
        reason = f"{VARIABLE} forbids it" if name in unwanted else None
        if reason is None and not asked:
            reason = backend.worthwhile(*given)
        reason = reason or backend.supports(*given)
        if reason is None:
            if reasons:
                log_once(logging.DEBUG, f"FAVOR+ by {name}, for {'; '.join(reasons)}.")
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError(
        f"None of the backends asked for by {VARIABLE} or favor_backend serves here ({'; '.join(reasons)}). Ask for "
        f"another of {', '.join(table)}, or for none: the fastest that serves is then chosen."
    )


@functools.lru_cache(maxsize=1000)
def log_once(level: int, message: str) -> None:
    """One log line for the life of the process."""
    logger.log(level, message)


@functools.cache
def from_package(module: str) -> ModuleType | None:
    """
    A module of backends that do not travel with checkpoints: that of the installed package, if there is one.

    They are many lines, need a compiler or a GPU, and change nothing but speed. A checkpoint's code that has to do
    without them says so in the log.
    """
    try:
        # by name, or loading a checkpoint would demand the package
        found = importlib.import_module(f"scbert.modeling_scbert.{module}")
        contract = importlib.import_module("scbert.modeling_scbert.backends_scbert").CONTRACT
    except ImportError as error:
        log_once(logging.DEBUG, f"No {module}: {error}.")
        return None
    return found if contract == CONTRACT else None
