"""An executor: a slot and the executable that reads it, ready for one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from flame_jax.fke.engine import Engine
from flame_jax.packing import Bucket, Extent, Layout, Place, place
from flame_jax.pda.staging import Slot
from flame_jax.record import RecordLayout


class Piece(NamedTuple):
    """Candidates [low, high) of one record."""

    record: np.ndarray
    low: int
    high: int


class Executor:
    """Fills its slot, launches, and reads the scores of each piece back.

    A slot must not be filled again before `scores` has returned for its last batch.
    """

    def __init__(self, engine: Engine, bucket: Bucket, records: RecordLayout, layout: Layout) -> None:
        self.bucket = bucket
        self._engine, self._records, self._layout = engine, records, layout
        self._slot = Slot(engine.slots[bucket])
        self._places: list[Place] = []
        self._counts: list[int] = []
        self._result: jax.Array | None = None

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces into the slot."""
        self._slot.clear()
        extents = [Extent(self._records.extent(p.record).history, p.high - p.low) for p in pieces]
        self._places = place(extents, self.bucket, self._layout)
        self._counts = [e.candidates for e in extents]
        for row, (where, piece) in enumerate(zip(self._places, pieces, strict=True)):
            self._records.write(self._slot.fields, row, where, *piece)

    def launch(self) -> None:
        """Start the executable; returns at once."""
        self._result = self._engine.launch(self.bucket, self._slot.words)

    def scores(self) -> list[np.ndarray]:
        """Wait for the launched batch: float32[count, tasks] per piece, in the order filled."""
        assert self._result is not None, "nothing was launched"
        result, self._result = np.asarray(self._result), None
        base = self.bucket.tokens - self.bucket.candidates
        starts = [where.candidate_start - base for where in self._places]
        return [result[at : at + count] for at, count in zip(starts, self._counts, strict=True)]
