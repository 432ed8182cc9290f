"""Rows of an item table in host memory that the device holds too: those used most, chosen anew from time to time.

A row that the device holds need not be copied to the slot, which then names its place on the device instead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flame_jax.host_table import places_of
from flame_jax.pjrt import place

log = logging.getLogger(__name__)

SAMPLE = 16
"""The rows of one of so many batches are counted."""
BETTER = 1.01
"""How many times as much use other rows must have had to take the places of those that are held."""


class Held(NamedTuple):
    """A choice of rows. A batch is filled and run by one and the same.

    Attributes:
        places: int32[table rows], where on the device a row is; -1 for one that is not there.
        rows: [hot rows, width], the same on every device of the version's lanes.
    """

    places: np.ndarray
    rows: Mapping[jax.Device, jax.Array]


class HotRows:
    """Counts which rows are used and keeps the most used on the device; `seen` in one thread, `renew` in another.

    Args:
        table: int32[rows, words] in host memory.
        first: what each device holds of it at first, its first rows; a GPU's own device before its twins in further
            clients, see `pjrt.place`.

    Attributes:
        held: the choice for batches that are filled from now on.
        counted: uses of rows that the device held, and of others, in the batches that were counted.
    """

    def __init__(self, table: np.ndarray, first: Mapping[jax.Device, jax.Array]) -> None:
        ((self._count, self._dtype),) = {(len(rows), rows.dtype) for rows in first.values()}
        self._table, self._devices = table, tuple(first)
        self._uses = np.zeros(len(table), np.uint32)
        self._turn = 0
        self.counted = (0, 0)
        self._chosen = np.arange(self._count)
        self.held = Held(places_of(self._chosen, len(table)), first)

    def seen(self, items: Iterable[np.ndarray]) -> None:
        """A batch used these rows, int32[n] each; they are looked at if it is its turn to be counted."""
        self._turn = (self._turn + 1) % SAMPLE
        if self._turn:
            return
        every = np.concatenate([*items])
        np.add.at(self._uses, every, 1)
        held, others = self.counted
        now = int(np.count_nonzero(self.held.places[every] >= 0))
        self.counted = held + now, others + len(every) - now

    def renew(self) -> bool:
        """Choose again by what was seen, of late above all; whether other rows are held now. Takes seconds."""
        uses = self._uses.copy()
        self._uses //= 2  # a count that is lost meanwhile is one of a sample
        chosen = np.sort(np.argpartition(uses, len(uses) - self._count)[len(uses) - self._count :])
        before, after = int(uses[self._chosen].sum(dtype=np.int64)), int(uses[chosen].sum(dtype=np.int64))
        if after <= BETTER * before:
            return False
        values: Any = np.take(self._table, chosen, axis=0).view(self._dtype)
        rows = place(values, self._devices)
        self._chosen, self.held = chosen, Held(places_of(chosen, len(self._table)), rows)
        total = max(1, int(uses.sum(dtype=np.int64)))
        log.info("the device holds rows of %.1f %% of uses, before %.1f %%", 100 * after / total, 100 * before / total)
        return True


class Renewal:
    """Renews hot rows every so many seconds, from a thread, until it is closed."""

    def __init__(self, hot: HotRows, seconds: float) -> None:
        self._hot, self._seconds, self._closed = hot, seconds, threading.Event()
        self._thread = threading.Thread(target=self._run, name="flame-hot-rows", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self._hot.renew()
            except jax.errors.JaxRuntimeError as error:  # no room on the device for a second copy, say
                log.error("other rows can't be held on the device: %s", str(error).split("\n", 1)[0])
            except Exception:
                log.exception("other rows can't be held on the device")

    def close(self, seconds: float) -> None:
        """End the thread; a renewal under way is waited for so long."""
        self._closed.set()
        self._thread.join(seconds)
