"""An executor: a slot and the executable that reads it, ready for one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from flame_jax.fke.engine import Engine
from flame_jax.packing import Bucket, Layout
from flame_jax.pda.staging import Slot
from flame_jax.record import Piece, RecordLayout


class Executor:
    """Fills its slot, launches, and reads the scores of each piece back.

    A slot must not be filled again before `scores` has returned for its last batch.
    """

    def __init__(self, engine: Engine, bucket: Bucket, records: RecordLayout, layout: Layout) -> None:
        self.bucket = bucket
        self._engine, self._records, self._layout = engine, records, layout
        self._slot = Slot(engine.slots[bucket])
        self._rows: list[slice] = []
        self._result: jax.Array | None = None

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces into the slot."""
        self._slot.clear()
        self._rows = self._records.fill(self._slot.fields, pieces, self.bucket, self._layout)

    def launch(self) -> None:
        """Start the executable; returns at once."""
        self._result = self._engine.launch(self.bucket, self._slot.words)

    def scores(self) -> list[np.ndarray]:
        """Wait for the launched batch: float32[count, tasks] per piece, in the order filled."""
        assert self._result is not None, "nothing was launched"
        result, self._result = np.asarray(self._result), None
        return [result[rows] for rows in self._rows]
