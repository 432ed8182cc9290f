"""The cache of items against a plain dictionary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.feature_config import CacheConfig
from flame_jax.pda.cache import JITTER, OVERHEAD, ItemCache
from flame_jax.pda.records import item_dtype
from tests.pda.stored import SCHEMA, ids

SECOND = 10**9
CONFIG = CacheConfig("sync", mib=1, ttl_seconds=100.0, absent_ttl_seconds=10.0)


@dataclass
class Clock:
    """Time that passes when told."""

    now: int = 5 * SECOND

    def __call__(self) -> int:
        return self.now


def rows_of(items: np.ndarray, year: float) -> np.ndarray:
    rows = np.zeros(len(items), item_dtype(SCHEMA))
    rows["id"], rows["year"] = items, year
    return rows


def put(cache: ItemCache, items: np.ndarray, year: float, *, found: bool = True) -> None:
    cache.put(items, rows_of(items, year if found else 0.0), np.full(len(items), found))


ITEMS = st.sets(st.integers(0, 9), max_size=6).map(lambda some: np.array(sorted(some), np.int64))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), ITEMS, st.booleans()),
        st.tuples(st.just("look"), ITEMS),
        st.tuples(st.just("wait"), st.sampled_from([1, 8, 11, 80, 101])),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(STEPS)
def test_what_was_put_is_there_until_it_is_too_old(steps: list[tuple[object, ...]]) -> None:
    clock = Clock()
    cache, model = ItemCache(SCHEMA, CONFIG, clock), dict[int, tuple[float, bool, int]]()
    seen = [0, 0, 0]
    for number, step in enumerate(steps, start=1):
        if step[0] == "wait":
            clock.now += step[1] * SECOND  # type: ignore[operator]
            continue
        items: np.ndarray = step[1]  # type: ignore[assignment]
        if step[0] == "put":
            put(cache, items, float(number), found=bool(step[2]))
            model |= {item: (float(number) if step[2] else 0.0, bool(step[2]), clock.now) for item in items.tolist()}
            continue
        held = cache.lookup(items)
        assert held.rows["id"].tolist() == items.tolist()
        for at, item in enumerate(items.tolist()):
            year, found, since = model.get(item, (0.0, False, 0))
            assert held.known[at] == (item in model)
            assert (held.rows["year"][at], held.found[at]) == (year, found)
            age, life = (clock.now - since) / SECOND, 100.0 if found else 10.0
            if item in model and not life * (1 - JITTER) <= age <= life:  # between them chance decides
                assert held.fresh[at] == (age < life)
            seen[0 if held.fresh[at] else 1 if held.known[at] else 2] += 1
    assert list(cache.counts) == [*seen, 0]


def test_lives_differ_by_a_tenth_at_most() -> None:
    clock = Clock()
    cache, items = ItemCache(SCHEMA, CONFIG, clock), np.arange(1000)
    put(cache, items, 1.0)
    start, shares = clock.now, []
    for age in (89, 91, 95, 99, 101):
        clock.now = start + age * SECOND
        shares.append(cache.lookup(items).fresh.mean())
    assert shares[0] == 1.0
    assert shares[-1] == 0.0
    assert 1 > shares[1] > shares[2] > shares[3] > 0
    assert shares[2] == pytest.approx(0.5, abs=0.1)


def test_memory_is_bounded_and_the_least_recently_used_makes_room() -> None:
    cache = ItemCache(SCHEMA, CONFIG, Clock())
    room = 2**20 // (item_dtype(SCHEMA).itemsize + 9 + OVERHEAD)
    put(cache, np.arange(room), 1.0)
    assert cache.counts.evictions == 0
    cache.lookup(np.arange(10))
    put(cache, np.arange(room, room + 100), 2.0)
    assert cache.counts.evictions == 100
    assert cache.nbytes <= 2**20
    assert cache.lookup(np.arange(10)).known.all()
    assert not cache.lookup(np.arange(10, 110)).known.any()
    put(cache, np.arange(room, room + 100), 3.0)
    assert cache.counts.evictions == 100, "what is replaced makes room for itself"


def test_a_row_is_not_the_caches_own() -> None:
    cache = ItemCache(SCHEMA, CONFIG, Clock())
    rows = rows_of(ids(3), 1.0)
    cache.put(ids(3), rows, np.array([True]))
    rows["year"] = 9.0
    assert cache.lookup(ids(3)).rows["year"].tolist() == [1.0]
