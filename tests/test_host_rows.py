"""Rows of a table in host memory: copied in parts, by any number of threads, and only such as are there."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax import host_table
from flame_jax.host_table import Copy, HostTable

TABLE = np.random.default_rng(0).integers(-(2**31), 2**31, (50, 6)).astype(np.int32)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 49), max_size=40), max_size=5), st.sampled_from([1, 3]), st.integers(1, 50))
def test_every_row_comes_to_its_place(asked: list[list[int]], threads: int, at_a_time: int) -> None:
    buffer = np.full((2, 5, 40, 6), -1, np.int32)
    copies: list[Copy] = []
    for number, rows in enumerate(asked):
        every_other = number % 2 + 1  # interleaved histories leave rows out
        out = buffer[1, number, ::every_other][: len(rows)]
        wanted = np.array(rows, np.int32)[: len(out)]
        # Of some, only every third row is left to be copied.
        at = np.arange(0, len(wanted), 3) if number == 3 else None
        copies.append(Copy(wanted if at is None else wanted[at], out, at))
    expected = buffer.copy()
    for number, (wanted, out, at) in enumerate(copies):
        there = expected[1, number, :: number % 2 + 1][: len(out)]
        there[slice(None) if at is None else at] = TABLE[wanted]
    with pytest.MonkeyPatch.context() as patch, closing(HostTable(TABLE, threads)) as table:
        patch.setattr(host_table, "ROWS", at_a_time)
        patch.setattr(host_table, "FEW", 20)
        table.copy(copies)
    np.testing.assert_array_equal(buffer, expected)


@pytest.mark.parametrize("row", [-1, 50, 2**31 - 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_that_is_not_there_is_an_error(row: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_table, "FEW", 20)
    out = np.zeros((3000, 6), np.int32)
    rows = np.zeros(3000, np.int32)
    rows[2000] = row
    with closing(HostTable(TABLE, threads)) as table, pytest.raises(IndexError, match=f"{row}"):
        table.copy([Copy(rows, out)])
    with pytest.raises(IndexError, match=f"{row}"):
        host_table.find_held(rows, np.full(50, -1, np.int32))


@given(st.lists(st.integers(0, 49), max_size=30), st.sets(st.integers(0, 49)))
def test_what_the_device_lacks_is_copied(items: list[int], held: set[int]) -> None:
    places = np.full(50, -1, np.int32)
    places[sorted(held)] = np.arange(len(held))
    out = np.full((len(items), 6), 7, np.int32)
    wanted = np.array(items, np.int32)
    found = host_table.find_held(wanted, places)
    copy = found.copy(wanted, out)
    assert found.places.tolist() == [places[item] for item in items]
    HostTable(TABLE).copy([copy])
    for row, item in zip(out, items, strict=True):
        assert item in held or (row == TABLE[item]).all()
    lacking = sum(item not in held for item in items)
    assert len(copy.rows) == (len(items) if 2 * lacking > len(items) else lacking)
