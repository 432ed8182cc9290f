"""Memory that is used anew, request after request, instead of being allocated for each."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np


class Workspace:
    """Arrays of one thread, by name: a name's next array may be the same memory."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, size: int, dtype: Any) -> np.ndarray:
        """[size] of any content; earlier arrays of that name are no longer valid."""
        wanted = size * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < wanted:
            buffer = self._buffers[name] = np.empty(_power_of_two(wanted), np.uint8)
        return buffer[:wanted].view(dtype)


class BufferPool:
    """Buffers that one thread takes and another gives back; one that is never given back is simply freed."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._made: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self._changing = threading.Lock()

    def take(self, words: int) -> np.ndarray:
        """int32[words] of any content."""
        size = _power_of_two(words)
        with self._changing:
            free = self._free.get(size)
            buffer = free.pop() if free else None
            if buffer is None:
                buffer = np.empty(size, np.int32)
                self._made[id(buffer)] = buffer
        return buffer[:words]

    def give(self, array: np.ndarray) -> None:
        """Take an array of `take` back, which nobody reads any more, and nobody gives twice; others are left alone."""
        with self._changing:
            buffer = self._made.get(id(array.base))
            if buffer is not None and buffer is array.base:
                self._free.setdefault(len(buffer), []).append(buffer)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
