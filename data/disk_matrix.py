"""A matrix that would not fit into memory, in a file that has no name."""

import os
import tempfile
from pathlib import Path

import numpy as np

from .paths import failed_write


class DiskMatrix:
    """
    Rows of float32 on disk, zero until they are set: a `numpy.memmap` for the time of each access.

    The pages of a mapping count as memory of the process while it stands, so that a lasting one would grow with the
    rows. The file is gone when this is forgotten, or the process killed.

    `output` is the final one that the rows are for: the file lies on its disk, and its name is told in the `OSError` of
    a disk that has no room for the whole matrix.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, int], output: str | Path):
        self.shape = shape
        size = shape[0] * shape[1] * self.dtype.itemsize
        try:
            # kept open for the mappings to come
            self._file = tempfile.TemporaryFile(dir=Path(output).absolute().parent)  # noqa: SIM115
            # reserved where the system can: into a file with holes, a mapping would meet a full disk as a crash
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
        except OSError as error:
            raise failed_write(error, output) from None

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        self._mapped()[rows] = values

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return np.array(self._mapped()[rows])

    def _mapped(self) -> np.memmap:
        return np.memmap(self._file, self.dtype, "r+", shape=self.shape)
