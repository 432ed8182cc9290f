"""An executor: a slot and the executable that reads it, ready for one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from flame_jax.fke.engine import Engine
from flame_jax.packing import Bucket, Layout
from flame_jax.pda.hot_rows import Held, HotRows
from flame_jax.pda.page_lock import PageLock
from flame_jax.pda.staging import Slot
from flame_jax.record import Piece, RecordLayout


class Scored(NamedTuple):
    """Of one piece.

    Attributes:
        values: float32[count, tasks], for reading; part of the whole batch's scores.
        finite: all of them are numbers.
    """

    values: np.ndarray
    finite: bool


class Executor:
    """Fills its slot, launches, and reads the scores of each piece back, in this order; the slot refuses any other.

    Args:
        engine: a lane's.
        page_lock: of the same device, as the lane's client sees it.
        hot: rows that the engine's device holds, among others.
    """

    def __init__(
        self,
        engine: Engine,
        bucket: Bucket,
        records: RecordLayout,
        layout: Layout,
        page_lock: PageLock,
        hot: HotRows | None = None,
    ) -> None:
        self.bucket = bucket
        self._engine, self._records, self._layout = engine, records, layout
        self._slot = Slot(engine.slots[bucket])
        page_lock.lock(self._slot)
        self._hot = hot
        self._held: Held | None = None
        self._rows: list[slice] = []
        self._finite = np.empty(0, np.bool_)
        self._result: jax.Array | None = None

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces into the slot.

        Raises:
            SlotBusy: the last batch is still under way.
        """
        fields = self._slot.fill()
        try:
            held = None if self._hot is None else self._hot.held
            places = None if held is None else held.places
            self._rows = self._records.fill(fields, pieces, self.bucket, self._layout, places)
            if self._hot is not None:
                self._hot.seen(items for piece in pieces for items in self._records.items(piece))
        except BaseException:
            self._slot.release()
            raise
        self._held = held

    def launch(self) -> None:
        """Start the executable; returns at once."""
        words = self._slot.launch()
        try:
            hot = None if self._held is None else self._held.rows[self._engine.device]
            self._result = self._engine.launch(self.bucket, words, hot)
        except BaseException:
            self._end()
            raise

    def scores(self) -> list[Scored]:
        """Wait for the launched batch; its pieces in the order filled."""
        assert self._result is not None, "nothing was launched"
        try:
            # A copy: the device's memory is not to live for as long as an answer does.
            result = np.array(self._result)
        finally:
            self._result = None
            self._end()
        if self._finite.shape != result.shape:
            self._finite = np.empty(result.shape, np.bool_)
        # Mostly the whole batch is fine, and its pieces need no look of their own.
        fine = bool(np.isfinite(result, out=self._finite).all())
        return [Scored(result[rows], fine or bool(self._finite[rows].all())) for rows in self._rows]

    def _end(self) -> None:
        self._held = None
        self._slot.finish()
        self._slot.release()
