"""The feature query in its three modes, on a store that answers when told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from flame_jax.feature_config import CacheConfig
from flame_jax.pda import query as module
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.records import CorruptRecord, UserRecord, feature_row, item_dtype
from flame_jax.pda.store import Description, Fetched, StoreError
from flame_jax.request import History
from tests.pda.stored import SCHEMA, ids

KNOWN = 100
"""Items below this number are in the store."""


class Told:
    """A store whose answers wait for `answer`, unless it answers at once.

    Attributes:
        asked: user and items of every question.
        year: what items have now.
        error: what comes instead of answers.
        damaged: items whose records are; so is the record of the user of this name.
    """

    name, description = "told", Description("test", SCHEMA)

    def __init__(self, *, at_once: bool = True) -> None:
        self.asked: list[tuple[str | None, list[int]]] = []
        self.year = 1.0
        self.error: Exception | None = None
        self.damaged: set[int] = set()
        self._answers = asyncio.Event()
        if at_once:
            self._answers.set()

    def answer(self) -> None:
        self._answers.set()

    def wait(self) -> None:
        self._answers.clear()

    async def fetch(self, user: str | None, item_ids: np.ndarray, *, patient: bool = False) -> Fetched:
        assert (np.diff(item_ids) > 0).all()
        assert not (patient and user), "only the background has time"
        self.asked.append((user, item_ids.tolist()))
        await self._answers.wait()
        if self.error is not None:
            raise self.error
        if user == "damaged" or not self.damaged.isdisjoint(item_ids.tolist()):
            raise CorruptRecord("damaged")
        rows = np.zeros(len(item_ids), item_dtype(SCHEMA))
        found = item_ids < KNOWN
        rows["id"], rows["year"] = item_ids, np.where(found, self.year, 0.0)
        record = UserRecord(History.empty(), feature_row(SCHEMA.user_features, {})) if user == "u" else None
        return Fetched(record, rows, found)

    async def aclose(self) -> None:
        pass


class Clock:
    """Cache time that passes when told."""

    now = 0

    def __call__(self) -> int:
        return self.now


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        await test()

    asyncio.run(all_of_it())


def query_of(store: Told, mode: str, clock: Clock | None = None, **changed: float) -> FeatureQuery:
    query = FeatureQuery(store, CacheConfig(mode, **changed))  # type: ignore[arg-type]
    if query.cache is not None and clock is not None:
        query.cache._clock = clock
    return query


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.0)


async def settle() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def later(clock: Clock, seconds: float) -> None:
    clock.now += int(seconds * 1e9)


@pytest.mark.parametrize("mode", ["off", "sync"])
def test_items_come_as_asked_and_repeat(mode: str) -> None:
    async def test() -> None:
        fetched = await query_of(Told(), mode).fetch("u", ids(7, 200, 3, 7))
        assert fetched.items["id"].tolist() == [7, 200, 3, 7]
        assert fetched.items["year"].tolist() == [1.0, 0.0, 1.0, 1.0]
        assert fetched.found.tolist() == [True, False, True, True]
        assert fetched.user is not None
        assert not fetched.degraded

    run(test)


def test_without_a_cache_the_store_is_asked_every_time() -> None:
    async def test() -> None:
        store = Told()
        query = query_of(store, "off")
        for _ in range(2):
            await query.fetch("u", ids(3))
        assert store.asked == [("u", [3])] * 2

    run(test)


def test_in_sync_what_is_missing_or_too_old_is_waited_for() -> None:
    async def test() -> None:
        store, clock = Told(), Clock()
        query = query_of(store, "sync", clock)
        await query.fetch("u", ids(3, 4))
        await query.fetch("u", ids(3, 4, 5))
        assert store.asked == [("u", [3, 4]), ("u", [5])]
        later(clock, 61)
        store.year = 2.0
        fetched = await query.fetch("u", ids(3, 4))
        assert fetched.items["year"].tolist() == [2.0, 2.0]
        assert not fetched.degraded
        store.error = StoreError("gone")
        with pytest.raises(StoreError):
            await query.fetch("u", ids(6))

    run(test)


def test_what_the_store_lacks_is_remembered_for_a_shorter_time() -> None:
    async def test() -> None:
        store, clock = Told(), Clock()
        query = query_of(store, "sync", clock)
        for wait, times in ((0, 1), (8, 1), (3, 2)):
            later(clock, wait)
            assert (await query.fetch("u", ids(200))).found.tolist() == [False]
            assert [items for _, items in store.asked].count([200]) == times

    run(test)


def test_in_async_nothing_is_waited_for_but_the_user() -> None:
    async def test() -> None:
        store, clock = Told(), Clock()
        query = query_of(store, "async", clock)
        first = await query.fetch("u", ids(3))
        assert first.items["year"].tolist() == [0.0], "not there yet: the default"
        assert first.degraded
        assert first.user is not None
        await settle()
        second = await query.fetch("u", ids(3))
        assert second.items["year"].tolist() == [1.0]
        assert not second.degraded
        later(clock, 61)
        store.year = 2.0
        third = await query.fetch("u", ids(3))
        assert third.items["year"].tolist() == [1.0], "too old, but there"
        assert third.degraded
        await settle()
        fourth = await query.fetch("u", ids(3))
        assert fourth.items["year"].tolist() == [2.0]
        assert query.refreshed == 2
        assert query.cache is not None
        assert query.cache.counts[:3] == (2, 1, 1)

    run(test)


def test_in_async_calls_are_answered_without_the_store() -> None:
    async def test() -> None:
        store, clock = Told(), Clock()
        query = query_of(store, "async", clock)
        await query.fetch("u", ids(3))
        await settle()
        store.error = StoreError("gone")
        later(clock, 61)
        fetched = await query.fetch("u", ids(3, 4))
        assert fetched.items["year"].tolist() == [1.0, 0.0]
        assert (fetched.user, fetched.user_lost, fetched.degraded) == (None, True, True)
        await settle()
        store.error = None
        query._rest_until = 0.0
        await query.fetch("u", ids(3, 4))
        await settle()
        healed = await query.fetch("u", ids(3, 4))
        assert (healed.items["year"].tolist(), healed.degraded) == ([1.0, 1.0], False)
        store.error = CorruptRecord("damaged")
        with pytest.raises(CorruptRecord):
            await query.fetch("u", ids(3))

    run(test)


def test_an_unknown_user_is_not_a_lost_one() -> None:
    async def test() -> None:
        fetched = await query_of(Told(), "async").fetch("nobody", ids())
        assert (fetched.user, fetched.user_lost, fetched.degraded) == (None, False, False)

    run(test)


def test_items_on_their_way_are_not_asked_for_again() -> None:
    async def test() -> None:
        store = Told(at_once=False)
        query = query_of(store, "sync")
        calls = [asyncio.create_task(query.fetch("u", ids(*items))) for items in ((3, 4), (4, 5), (3, 5, 6))]
        await settle()
        assert store.asked == [("u", [3, 4]), ("u", [5]), ("u", [6])]
        store.answer()
        for call in calls:
            fetched = await call
            assert set(fetched.items["year"].tolist()) == {1.0}
            assert fetched.found.all()

    run(test)


def test_who_goes_away_takes_no_answer_with_him() -> None:
    async def test() -> None:
        store = Told(at_once=False)
        query = query_of(store, "sync")
        first = asyncio.create_task(query.fetch("u", ids(3)))
        await settle()
        second = asyncio.create_task(query.fetch("u", ids(3)))
        await settle()
        first.cancel()
        await settle()
        store.answer()
        assert (await second).items["year"].tolist() == [1.0]
        assert first.cancelled()
        assert [items for _, items in store.asked] == [[3], []]

    run(test)


def test_a_failure_is_everybodys_who_waits_for_it_and_is_not_kept() -> None:
    async def test() -> None:
        store = Told(at_once=False)
        store.error = StoreError("gone")
        query = query_of(store, "sync")
        calls = [asyncio.create_task(query.fetch("u", ids(3))) for _ in range(3)]
        await settle()
        store.answer()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, StoreError) for outcome in outcomes)
        store.error = None
        assert (await query.fetch("u", ids(3))).found.all()

    run(test)


def test_the_background_asks_for_much_at_once_and_for_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH", 4)
    monkeypatch.setattr(module, "WAITING", 10)

    async def test() -> None:
        store = Told(at_once=False)
        query = query_of(store, "async")
        calls = [asyncio.create_task(query.fetch("u", np.arange(n, n + 8))) for n in (0, 8)]
        await settle()
        store.answer()
        await asyncio.gather(*calls)
        await settle()
        asked = [items for user, items in store.asked if user is None]
        assert max(map(len, asked)) == 4
        assert 10 <= sum(map(len, asked)) <= 14, "what waits is bounded, and what is under way besides"
        assert len({item for items in asked for item in items}) == sum(map(len, asked)), "nothing twice"

    run(test)


def test_what_calls_lack_within_a_moment_is_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 0.02)

    async def test() -> None:
        store = Told()
        query = query_of(store, "async")
        for first in (0, 4, 8):
            assert (await query.fetch("u", np.arange(first, first + 4))).degraded
            await settle()
        assert [items for user, items in store.asked if user is None] == []
        await asyncio.sleep(0.1)
        (together,) = [items for user, items in store.asked if user is None]
        assert sorted(together) == list(range(12))
        assert not (await query.fetch("u", np.arange(12))).degraded

    run(test)


def test_closing_waits_for_what_is_under_way() -> None:
    async def test() -> None:
        store = Told()
        query = query_of(store, "async")
        store.wait()
        call = asyncio.create_task(query.fetch("u", ids(3)))
        await settle()
        closing = asyncio.create_task(query.aclose())
        await settle()
        assert not closing.done()
        store.answer()
        await closing
        assert (await call).user is not None

    run(test)


def test_the_background_rests_where_the_store_fails() -> None:
    async def test() -> None:
        store = Told()
        store.error = StoreError("gone")
        query = query_of(store, "async")
        for _ in range(10):
            await query.fetch("u", ids(3))
            await settle()
        assert [user for user, _ in store.asked].count(None) == 1

    run(test)


def test_somebody_elses_damaged_record_is_not_ours() -> None:
    async def test() -> None:
        store = Told(at_once=False)
        query = query_of(store, "sync")
        damaged = asyncio.create_task(query.fetch("damaged", ids(3, 4)))
        await settle()
        fine = asyncio.create_task(query.fetch("u", ids(4, 5)))
        await settle()
        store.answer()
        with pytest.raises(CorruptRecord):
            await damaged
        assert (await fine).items["year"].tolist() == [1.0, 1.0]

    run(test)


def test_a_damaged_item_holds_up_no_others_in_the_background() -> None:
    async def test() -> None:
        store, clock = Told(), Clock()
        store.damaged = {42}
        query = query_of(store, "async", clock)
        everything = np.arange(90)
        await query.fetch("u", everything)
        await settle()
        fetched = await query.fetch("u", everything)
        assert fetched.items["year"].tolist() == [float(item != 42) for item in everything.tolist()]
        assert fetched.found.tolist() == [item != 42 for item in everything.tolist()]
        assert not fetched.degraded, "not there for a while"
        store.damaged = set()
        later(clock, 11)
        await query.fetch("u", ids(42))
        await settle()
        assert (await query.fetch("u", ids(42))).items["year"].tolist() == [1.0]

    run(test)


def test_what_was_not_asked_for_yet_is_not_missing() -> None:
    async def test() -> None:
        query = query_of(Told(), "async")
        assert (await query.fetch("u", ids(3, 200))).found.tolist() == [True, True]
        await settle()
        assert (await query.fetch("u", ids(3, 200))).found.tolist() == [True, False]

    run(test)
