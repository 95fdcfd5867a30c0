"""A matrix that would not fit into memory, in a file that has no name."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .failed_writes import explain

# rows taken together where all are passed over
BLOCK = 1 << 14


def row_blocks(n_rows: int) -> Iterator[slice]:
    """
    Slices that cover `n_rows` rows in order.

    Examples
    --------
    >>> list(row_blocks(20_000))
    [slice(0, 16384, None), slice(16384, 20000, None)]
    """
    for start in range(0, n_rows, BLOCK):
        yield slice(start, min(start + BLOCK, n_rows))


class RowFile:
    """
    Rows of float32 on disk, zero until they are set; memory holds only what is asked for.

    The file is gone when this is closed, forgotten or killed.

    Parameters
    ----------
    shape
        Rows and columns.
    output
        The final output that the rows are for: the file lies on its disk, and its name is told if that is full.

    Raises
    ------
    OSError
        When a row cannot be written.

    Examples
    --------
    >>> rows = RowFile((3, 2), "cells.h5ad")
    >>> rows[1:] = np.ones((2, 2))
    >>> rows[:2].tolist(), rows[np.array([0, 2])].tolist()
    ([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]])
    """

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, int], output: str | Path):
        self.shape, self._output = shape, output
        self._width = shape[1] * self.dtype.itemsize
        try:
            # without a buffer: a failed write is told by the write, and not once more when the file is closed
            self._file = tempfile.TemporaryFile(dir=Path(output).absolute().parent, buffering=0)  # noqa: SIM115
            self._file.truncate(shape[0] * self._width)
        except OSError as error:
            raise explain(error, output) from None

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        start, stop = self._range(rows)
        values = np.ascontiguousarray(np.broadcast_to(values, (stop - start, self.shape[1])), self.dtype)
        waiting = memoryview(values).cast("B") if values.size else b""
        try:
            self._file.seek(start * self._width)
            while waiting:
                waiting = waiting[self._file.write(waiting) :]
        except OSError as error:
            raise explain(error, self._output) from None

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if not isinstance(rows, slice):
            taken = [self[int(row) : int(row) + 1] for row in rows]
            return np.concatenate(taken) if taken else np.empty((0, self.shape[1]), self.dtype)
        start, stop = self._range(rows)
        values = np.empty((stop - start, self.shape[1]), self.dtype)
        waiting = memoryview(values).cast("B") if values.size else b""
        self._file.seek(start * self._width)
        while waiting:
            waiting = waiting[self._file.readinto(waiting) :]
        return values

    def _range(self, rows: slice) -> tuple[int, int]:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("rows are taken in steps of 1")
        return start, max(start, stop)
