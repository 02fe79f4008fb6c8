"""Buffer of the bytes of one pipe."""

import os

import numpy as np
from numpy.typing import NDArray

PIPE_BYTES = 1 << 20


class PipeBuffer:
    """Bytes of one pipe, read without copies. Views that `peek` returned are never overwritten."""

    def __init__(self) -> None:
        self._data = np.empty(PIPE_BYTES, np.uint8)
        self._first = self._last = 0
        self.received = 0

    def __len__(self) -> int:
        return self._last - self._first

    def reserve(self, size: int) -> None:
        """Reserve contiguous room for `size` unread bytes."""
        if self._first + size > len(self._data):
            data = np.empty(max(size + PIPE_BYTES, len(self) * 3 // 2), np.uint8)
            data[: len(self)] = self._data[self._first : self._last]
            self._last = len(self)
            self._data, self._first = data, 0

    def receive(self, file: int, repeated: int = 0) -> int:
        """Read available bytes and discard up to `repeated` of them. Return the bytes read, 0 at the end."""
        if self._last == len(self._data):
            self.reserve(len(self) + PIPE_BYTES)
        count = os.readv(file, [self._data[self._last : self._last + PIPE_BYTES].data])
        kept = count - min(count, repeated)
        if 0 < kept < count:
            read = self._data[self._last : self._last + count]
            read[:kept] = read[count - kept :].copy()
        self._last += kept
        self.received += kept
        return count

    def peek(self, size: int) -> NDArray[np.uint8]:
        """Return up to `size` unread bytes; they remain unread."""
        return self._data[self._first : min(self._last, self._first + size)]

    def drop(self, size: int) -> None:
        """Count `size` bytes as read."""
        self._first = min(self._last, self._first + size)

    def truncate(self, size: int) -> None:
        """Discard the unread bytes after the first `size`."""
        self._last = min(self._last, self._first + size)
