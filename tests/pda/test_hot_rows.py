"""Rows that the device holds: those used most of late, each where its place says."""

from __future__ import annotations

import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.pda.hot_rows import SAMPLE, HotRows, Renewal
from tests import tiny

WIDTH = 6


def hot_rows(rows: int, count: int) -> tuple[HotRows, np.ndarray]:
    """Of a random table, and the table as floats."""
    values = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    return HotRows(values.view(np.int32), {tiny.device(): jax.device_put(values[:count], tiny.device())}), values


def use(hot: HotRows, items: list[int], times: int) -> None:
    """Batches of these items, so many of them counted."""
    half = len(items) // 2
    for _ in range(times * SAMPLE):
        hot.seen([np.array(items[:half], np.int32), np.array(items[half:], np.int32)])


def check(hot: HotRows, values: np.ndarray, count: int) -> list[int]:
    """Every place holds its row; returns the rows held."""
    places, rows = hot.held.places, np.asarray(hot.held.rows[tiny.device()])
    held = np.flatnonzero(places >= 0)
    assert rows.shape == (count, WIDTH)
    assert sorted(places[held].tolist()) == list(range(count))
    np.testing.assert_array_equal(rows[places[held]], values[held])
    return [int(row) for row in held]


def test_at_first_the_first_rows_are_held() -> None:
    hot, values = hot_rows(20, 4)
    assert check(hot, values, 4) == [0, 1, 2, 3]
    assert not hot.renew(), "nothing was used"


def test_the_most_used_are_held_and_in_time_others() -> None:
    hot, values = hot_rows(20, 3)
    use(hot, [5, 5, 5, 9, 9, 17, 17, 2], 10)
    assert hot.counted == (10, 70)
    before = hot.held
    assert hot.renew()
    assert check(hot, values, 3) == [5, 9, 17]
    assert before.places[:3].tolist() == [0, 1, 2], "who holds the choice before keeps it"
    assert np.asarray(before.rows[tiny.device()]).tobytes() == values[:3].tobytes()
    assert not hot.renew(), "the same rows are used most"
    for _ in range(8):
        use(hot, [1, 2, 3], 10)
        hot.renew()
    assert check(hot, values, 3) == [1, 2, 3]


def test_what_is_hardly_better_moves_nothing() -> None:
    hot, values = hot_rows(300, 2)
    use(hot, [0, 1], 200)
    use(hot, [7], 201)
    assert not hot.renew()
    assert check(hot, values, 2) == [0, 1]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.lists(st.integers(0, 29), min_size=1, max_size=80), st.booleans()), max_size=6))
def test_every_place_holds_its_row_whatever_is_used(batches: list[tuple[list[int], bool]]) -> None:
    hot, values = hot_rows(30, 7)
    for items, renewed in batches:
        use(hot, items, 1)
        if renewed:
            hot.renew()
        check(hot, values, 7)


def test_a_thread_renews_until_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    hot, values = hot_rows(20, 2)
    renewal = Renewal(hot, 0.01)
    use(hot, [8, 9], 10)
    until = time.monotonic() + 10
    while hot.held.places[8] < 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert check(hot, values, 2) == [8, 9]
    called = threading.Semaphore(0)
    errors = [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), MemoryError("none"), None, None]

    def fails() -> bool:
        called.release()
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error
        return False

    hot.renew = fails  # type: ignore[method-assign]
    for _ in range(4):
        assert called.acquire(timeout=10), "an error is told, and it goes on"
    assert [r.getMessage().endswith("no room") for r in caplog.records if "held" in r.getMessage()][-2:] == [
        True,
        False,
    ]
    renewal.close(10)
    assert "flame-hot-rows" not in {thread.name for thread in threading.enumerate()}
