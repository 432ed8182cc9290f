"""An item table in host memory: rows of it go to slots by several threads at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

ROWS = 1024
"""That a thread copies at a time: some 50 us."""


class Copy(NamedTuple):
    """Rows to copy.

    Attributes:
        rows: int32[n] of the table.
        out: int32[m, words], where they go.
        at: int64[n], to which rows of `out`; None: to all, in order.
    """

    rows: np.ndarray
    out: np.ndarray
    at: np.ndarray | None = None


class HostTable:
    """Copies rows; NumPy lets other threads run meanwhile.

    Args:
        table: int32[rows, words], which may be mapped from a file.
        threads: that copy; with one, whoever asks copies himself.
    """

    def __init__(self, table: np.ndarray, threads: int = 1) -> None:
        self._table = table
        self._pool = ThreadPoolExecutor(threads, "flame-rows") if threads > 1 else None

    def copy(self, copies: Sequence[Copy]) -> None:
        """Do all of these, and wait.

        Raises:
            IndexError: the table has no such row.
        """
        parts = [part for copy in copies for part in _parts(copy)]
        if self._pool is None or len(parts) == 1:
            for part in parts:
                self._take(part)
        else:
            list(self._pool.map(self._take, parts))

    def _take(self, part: Copy) -> None:
        rows, out, at = part
        if rows.min() < 0 or rows.max() >= len(self._table):
            raise IndexError(f"an item table of {len(self._table)} rows has no row {rows.min()} or {rows.max()}")
        if at is not None:
            out[at] = np.take(self._table, rows, axis=0)
            return
        np.take(self._table, rows, axis=0, out=out, mode="clip")  # with "raise" it would copy twice

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _parts(copy: Copy) -> Iterator[Copy]:
    rows, out, at = copy
    for first in range(0, len(rows), ROWS):
        part = slice(first, first + ROWS)
        yield Copy(rows[part], out[part]) if at is None else Copy(rows[part], out, at[part])


def host_table(table: np.ndarray | None, threads: int = 1) -> HostTable | None:
    """A `HostTable` where there is a table."""
    return None if table is None else HostTable(table, threads)
