"""What becomes of a write that fails: kept from HDF5, which would crash, and told in one sentence."""

import errno
import io
import os


class PatientFile(io.RawIOBase):
    """A file that remembers its first failed write and pretends all is well from then on.

    What could not be written is kept in memory: HDF5 reads its own metadata back, and crashes on anything else.
    The file is lost by then and will be removed; what counts is that HDF5 comes to its end quietly.
    """

    def __init__(self, raw):
        self._raw = raw
        self.error = None
        # (place, bytes) of every write since the first that failed, and the length the file would have
        self._unwritten = []
        self._length = raw.seek(0, os.SEEK_END)
        raw.seek(0)

    def write(self, data):
        view = memoryview(data).cast("B")
        start = self._raw.tell()
        try:
            done = 0
            while done < len(view) and self.error is None:
                done += self._raw.write(view[done:])
        except OSError as error:
            self.error = error
        if self.error is not None:
            self._unwritten.append((start, bytes(view)))
        self._length = max(self._length, start + len(view))
        self._raw.seek(start + len(view))
        return len(view)

    def truncate(self, size=None):
        self._length = self._raw.tell() if size is None else size
        try:
            return self._raw.truncate(size) if self.error is None else size
        except OSError as error:
            self.error = error
            return size

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        start = self._raw.tell()
        done = count = self._raw.readinto(view)
        while count and done < len(view):
            count = self._raw.readinto(view[done:])
            done += count
        # past the end are zeros, as HDF5's own driver has it, and not what lay in memory before
        view[done:] = bytes(len(view) - done)
        for place, data in self._unwritten:
            first, last = max(place, start), min(place + len(data), start + len(view))
            if first < last:
                view[first - start : last - start] = data[first - place : last - place]
        self._raw.seek(start + len(view))
        return len(view)

    def seek(self, offset, whence=os.SEEK_SET):
        if whence == os.SEEK_END and self.error is not None:
            return self._raw.seek(self._length + offset)
        return self._raw.seek(offset, whence)

    def tell(self):
        return self._raw.tell()

    def flush(self):
        """Nothing is buffered."""

    def readable(self):
        return True

    def writable(self):
        return True

    def seekable(self):
        return True


def explain(error, path):
    """One sentence for the usual causes of a failed write."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "your disk quota is used up; free some space and run the same command again",
        errno.EFBIG: "the file grew beyond the size allowed here (ulimit -f)",
        errno.EACCES: "the folder is not writable",
        errno.EROFS: "the file system is read-only",
    }
    reason = reasons.get(error.errno, error.strerror or str(error))
    return OSError(error.errno, f"Could not write {path}: {reason}. Nothing was left half-written.")
