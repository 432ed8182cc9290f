"""An executor's slot is not rewritten while a batch may still read it, whatever goes wrong."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import pytest

from flame_jax.dso.executor import Executor
from flame_jax.packing import Bucket, slot_layout
from flame_jax.pda.page_lock import PageLock
from flame_jax.pda.staging import SlotBusy
from flame_jax.record import Piece
from tests.dso.fakes import LAYOUT, RECORDS, SCHEMA, SMALL, STAGES, expected, record

FIELDS = slot_layout(SCHEMA, LAYOUT, SMALL)


class LateResult:
    """Scores that are read from the slot only when somebody waits for them, as a device might that is slow."""

    def __init__(self, words: np.ndarray, error: Exception | None, no_numbers: slice) -> None:
        self._words, self._error, self._no_numbers = words, error, no_numbers

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._error is not None:
            raise self._error
        fields = FIELDS.views(self._words)
        items = fields["item"][0, -SMALL.candidates :] + fields["item.weight"]
        scores = np.stack([items, fields["time"][0, -SMALL.candidates :]], axis=1).astype(np.float32)
        scores[self._no_numbers] = np.nan
        return scores


class SlowEngine:
    """One bucket; errors, and rows of scores that are no numbers, as told."""

    def __init__(self) -> None:
        self.slots = {SMALL: FIELDS}
        self.launching: Exception | None = None
        self.running: Exception | None = None
        self.no_numbers = slice(0, 0)

    def launch(self, bucket: Bucket, words: np.ndarray, hot: jax.Array | None = None) -> LateResult:
        if self.launching is not None:
            raise self.launching
        return LateResult(words, self.running, self.no_numbers)


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def executor(engine: SlowEngine) -> Executor:
    return Executor(engine, SMALL, RECORDS, LAYOUT, PageLock(jax.devices("cpu")[0]))  # type: ignore[arg-type]


def piece(ticket: int, candidates: int = 4) -> Piece:
    return Piece(record(ticket, candidates=candidates), 0, candidates)


def test_scores_are_of_the_batch_that_was_launched(executor: Executor) -> None:
    for ticket in (7, 8):
        executor.fill([piece(ticket)])
        executor.launch()
        (scored,) = executor.scores()
        np.testing.assert_array_equal(scored.values, expected(ticket))


def test_scores_that_are_no_numbers_are_told_of_their_piece_and_padding_is_nobodys(
    executor: Executor, engine: SlowEngine
) -> None:
    # Aligned, from the right: rows 4 to 7 are the first piece's, 0 to 4 the second's, row 7 is nobody's.
    for rows, finite in ((slice(0, 0), [True, True]), (slice(7, 8), [True, True]), (slice(2, 3), [True, False])):
        engine.no_numbers = rows
        executor.fill([piece(1, 3), piece(2, 4)])
        executor.launch()
        assert [scored.finite for scored in executor.scores()] == finite


def test_who_fills_a_slot_in_flight_is_refused_and_spoils_nothing(executor: Executor) -> None:
    executor.fill([piece(7)])
    executor.launch()
    refused = []

    def intrude() -> None:
        for _ in range(100):
            try:
                executor.fill([piece(8)])
            except SlotBusy:
                refused.append(True)

    threads = [threading.Thread(target=intrude) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 200
    np.testing.assert_array_equal(executor.scores()[0].values, expected(7))
    executor.fill([piece(8)])
    executor.launch()
    np.testing.assert_array_equal(executor.scores()[0].values, expected(8))


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_fails_frees_its_slot(executor: Executor, engine: SlowEngine, stage: str) -> None:
    error = RuntimeError("no")
    too_many = [piece(1, 8), piece(2, 8)]
    if stage == "fill":
        with pytest.raises(ValueError, match="do not fit"):
            executor.fill(too_many)
    else:
        engine.launching, engine.running = (error, None) if stage == "launch" else (None, error)
        executor.fill([piece(1)])
        if stage == "launch":
            with pytest.raises(RuntimeError):
                executor.launch()
        else:
            executor.launch()
            with pytest.raises(RuntimeError):
                executor.scores()
    engine.launching = engine.running = None
    executor.fill([piece(5)])
    executor.launch()
    np.testing.assert_array_equal(executor.scores()[0].values, expected(5))
