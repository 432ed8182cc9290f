"""An item table in host memory: rows of it go to slots by several threads at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

ROWS = 1024
"""That a thread copies at a time: some 50 us."""
FEW = 8 * ROWS
"""Fewer than these are copied by who asks: handing them out takes as long."""


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

    def __len__(self) -> int:
        return len(self._table)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Do all of these, and wait.

        Raises:
            IndexError: the table has no such row.
        """
        if self._pool is None or sum(len(copy.rows) for copy in copies) < FEW:
            for copy in copies:
                self._take(copy)
        else:
            list(self._pool.map(self._take, [part for copy in copies for part in _parts(copy)]))

    def _take(self, part: Copy) -> None:
        rows, out, at = part
        _check(rows, len(self._table))
        if at is not None:
            out[at] = np.take(self._table, rows, axis=0, mode="clip")
            return
        np.take(self._table, rows, axis=0, out=out, mode="clip")  # with "raise" it would copy twice

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def places_of(chosen: np.ndarray, rows: int) -> np.ndarray:
    """int32[rows]: where each of int64[n] distinct chosen rows lies among them, -1 for all others."""
    places = np.full(rows, -1, np.int32)
    places[chosen] = np.arange(len(chosen), dtype=np.int32)
    return places


class Found(NamedTuple):
    """Which of int32[n] items' rows the device holds.

    Attributes:
        places: int32[n], where; -1 for those that it lacks.
        lacking: int64[m], the numbers of those to be copied; None for all, in order, which is faster than one here and
            one there where it lacks more than half.
    """

    places: np.ndarray
    lacking: np.ndarray | None

    def copy(self, items: np.ndarray, out: np.ndarray) -> Copy:
        """What is to be copied to int32[n, words], of these items."""
        return Copy(items, out) if self.lacking is None else Copy(items[self.lacking], out, self.lacking)


def find_held(items: np.ndarray, places: np.ndarray) -> Found:
    """Look int32[n] items' rows up.

    Args:
        places: int32[rows of the table].

    Raises:
        IndexError: the table has no such row.
    """
    _check(items, len(places))
    found = np.take(places, items, mode="clip")  # twice as fast as an index, and as "raise"
    lacking = np.flatnonzero(found < 0)
    return Found(found, None if 2 * len(lacking) > len(items) else lacking)


def _check(rows: np.ndarray, count: int) -> None:
    if len(rows) and (rows.min() < 0 or rows.max() >= count):
        raise IndexError(f"an item table of {count} rows has no row {rows.min()} or {rows.max()}")


def _parts(copy: Copy) -> Iterator[Copy]:
    rows, out, at = copy
    for first in range(0, len(rows), ROWS):
        part = slice(first, first + ROWS)
        yield Copy(rows[part], out[part]) if at is None else Copy(rows[part], out, at[part])


def host_table(table: np.ndarray | None, threads: int = 1) -> HostTable | None:
    """A `HostTable` where there is a table."""
    return None if table is None else HostTable(table, threads)
