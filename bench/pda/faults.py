"""A real Valkey behind a proxy that fails in every way: are calls answered in time, and with their own values?

Every value says whose it is: an item's feature is a function of its id, a user's events of the user's number.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bench.pda.servers import Proxy, Server, running
from flame_jax.feature_config import CacheConfig, StoreConfig
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.pda.redis_store import RedisStore
from flame_jax.pda.store import Fetched, StoreError
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema

SCHEMA = FeatureSchema(actions=1, item_features=(Feature("number", "numeric"),))
ITEMS, USERS, CANDIDATES = 2000, 100, 50
STORE = "lmdb"
"""Folder of what servers are filled with, in theirs."""
TIMEOUT_MS = 20.0
IN_TIME = 0.05
"""Seconds that a call may take for its features."""
AT_ONCE = 8
Mode = Literal["sync", "async"]
MODES: tuple[Mode, ...] = ("sync", "async")


class Scenario(NamedTuple):
    """What happens to the proxy, or to the server, while calls go on."""

    name: str
    spoil: Callable[[Proxy, Server], Awaitable[None]]


async def _killed(server: Server) -> None:
    await asyncio.to_thread(server.stop)


async def _set(proxy: Proxy, name: str, value: object) -> None:
    setattr(proxy, name, value)


def _scenarios() -> list[Scenario]:
    chance = random.Random(0)
    return [
        Scenario("none", lambda proxy, _: _set(proxy, "delay", 0.0)),
        Scenario("+5 ms", lambda proxy, _: _set(proxy, "delay", 0.005)),
        Scenario("+20 ms", lambda proxy, _: _set(proxy, "delay", 0.02)),
        Scenario("+100 ms", lambda proxy, _: _set(proxy, "delay", 0.1)),
        Scenario("1 % of answers are resets", lambda p, _: _set(p, "reset", lambda _: chance.random() < 0.01)),
        Scenario("answers in pieces of 100 bytes", lambda proxy, _: _set(proxy, "slices", 100)),
        Scenario("hangs", lambda proxy, _: _set(proxy, "hang", True)),
        Scenario("is killed", lambda _, server: _killed(server)),
    ]


def write(folder: Path) -> None:
    """The store."""
    rows = np.zeros(ITEMS, item_dtype(SCHEMA))
    rows["id"] = rows["number"] = np.arange(ITEMS)
    with LmdbWriter(folder, SCHEMA) as writer:
        writer.put_items(rows)
        writer.put_users((f"u{n}", _history(n), feature_row((), {})) for n in range(USERS))
        writer.finish("echo")


def _history(user: int) -> History:
    events = user % 7
    return History(np.full(events, user), np.zeros(events, np.int32), np.arange(events))


def own(fetched: Fetched, user: int, wanted: np.ndarray) -> bool:
    """Whether every value is the one that its key has, or a default where the answer is degraded."""
    numbers = fetched.items["number"]
    if (fetched.items["id"] != wanted).any() or not fetched.found.all():
        return False
    if not ((numbers == wanted) | ((numbers == 0) & fetched.degraded)).all():
        return False
    if fetched.user is None:
        return fetched.user_lost
    return bool(len(fetched.user.history) == user % 7 and (fetched.user.history.item_ids == user).all())


@asynccontextmanager
async def _query(server: Server, cache: CacheConfig, **changed: Any) -> AsyncIterator[tuple[FeatureQuery, Proxy]]:
    proxy = Proxy(server.port)
    config = StoreConfig(url=f"redis://127.0.0.1:{await proxy.start()}", timeout_ms=TIMEOUT_MS, connections=AT_ONCE)
    query = FeatureQuery(await RedisStore.open(replace(config, **changed)), cache)
    try:
        yield query, proxy
    finally:
        await query.aclose()
        await proxy.stop()


class _Tally:
    """Of one scenario."""

    def __init__(self) -> None:
        self.calls = self.in_time = self.degraded = self.failed = self.wrong = 0

    async def call(self, query: FeatureQuery, chance: random.Random) -> None:
        user, wanted = chance.randrange(USERS), np.array(chance.choices(range(ITEMS), k=CANDIDATES), np.int64)
        begun = time.perf_counter()
        self.calls += 1
        try:
            fetched = await query.fetch(f"u{user}", wanted)
        except StoreError:
            self.failed += 1
        else:
            self.in_time += time.perf_counter() - begun <= IN_TIME
            self.degraded += fetched.degraded
            self.wrong += not own(fetched, user, wanted)


async def _scenario(
    scenario: Scenario, mode: Literal["sync", "async"], server: Server, seconds: float
) -> dict[str, Any]:
    chance, tally = random.Random(1), _Tally()
    async with _query(server, CacheConfig(mode, ttl_seconds=0.5)) as (query, proxy):
        for _ in range(100):  # a warm cache
            await _Tally().call(query, chance)
        await scenario.spoil(proxy, server)
        end = time.monotonic() + seconds

        async def caller() -> None:
            while time.monotonic() < end:
                await tally.call(query, chance)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        proxy.delay, proxy.hang, proxy.slices, proxy.reset = 0.0, False, 0, lambda _: False
        if server.process is None:
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.fill, server.folder / STORE)
        recovery = await _recovered(query)
    return {
        "scenario": scenario.name,
        "mode": mode,
        "calls": tally.calls,
        "in_time": tally.in_time / tally.calls,
        "degraded": tally.degraded / tally.calls,
        "failed": tally.failed / tally.calls,
        "wrong": tally.wrong,
        "recovery_seconds": recovery,
    }


async def _recovered(query: FeatureQuery) -> float:
    """Seconds until a call is answered whole."""
    begun, wanted = time.monotonic(), np.arange(CANDIDATES)
    while time.monotonic() - begun < 30:
        try:
            if not (await query.fetch("u1", wanted)).degraded:
                break
        except StoreError:
            pass
        await asyncio.sleep(0.005)
    return time.monotonic() - begun


async def _cancels(server: Server, calls: int) -> dict[str, Any]:
    """Calls of which a tenth is cancelled at random moments, with answers held back now and then."""
    chance, wrong, cancelled, failed = random.Random(2), 0, 0, 0
    async with _query(server, CacheConfig("sync", ttl_seconds=0.01), timeout_ms=1000.0) as (query, proxy):

        async def call() -> bool:
            user, wanted = chance.randrange(USERS), np.array(chance.choices(range(ITEMS), k=5), np.int64)
            return own(await query.fetch(f"u{user}", wanted), user, wanted)

        for _ in range(calls // 40):
            proxy.delay = chance.choice([0.0, 0.0, 0.0005])
            tasks = [asyncio.create_task(call()) for _ in range(40)]
            await asyncio.sleep(chance.random() * 0.004)
            for task in tasks:
                if chance.random() < 0.1:
                    task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                cancelled += isinstance(outcome, asyncio.CancelledError)
                failed += isinstance(outcome, StoreError)
                wrong += outcome is False
    return {"calls": calls // 40 * 40, "cancelled": cancelled, "failed": failed, "wrong": wrong}


def faults(progress: Callable[[str], None], seconds: float = 5.0, calls: int = 200_000) -> dict[str, Any]:
    """A row per scenario and mode, and the count of wrong values among cancelled calls."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, STORE))
        for scenario in _scenarios():
            for mode in MODES:
                with running(Path(folder)) as server:
                    server.fill(server.folder / STORE)
                    rows.append(asyncio.run(_scenario(scenario, mode, server, seconds)))
                row = rows[-1]
                progress(f"{scenario.name}, {mode}: {row['in_time']:.2%} in time, {row['wrong']} wrong")
        with running(Path(folder)) as server:
            server.fill(server.folder / STORE)
            cancels = asyncio.run(_cancels(server, calls))
    progress(f"{cancels['calls']} calls, {cancels['cancelled']} cancelled: {cancels['wrong']} wrong")
    return {"faults": rows, "cancels": cancels}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| the store | mode | calls | in 50 ms | degraded | failed | wrong | whole again s |", "|" + "---|" * 8]
    lines += [
        f"| {r['scenario']} | {r['mode']} | {r['calls']} | {r['in_time']:.2%} | {r['degraded']:.1%} "
        f"| {r['failed']:.1%} | {r['wrong']} | {r['recovery_seconds']:.2f} |"
        for r in result["faults"]
    ]
    return "\n".join(lines)
