"""The feature query: what a request needs, from the cache and the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from itertools import islice
from typing import Any

import numpy as np

from flame_jax.feature_config import CacheConfig
from flame_jax.pda.cache import ItemCache, Lookup
from flame_jax.pda.records import CorruptRecord
from flame_jax.pda.store import Fetched, Store, StoreError

log = logging.getLogger(__name__)

REFRESH = 1024
"""Items that the background asks for at once."""
GATHER_SECONDS = 0.01
"""That the background lets pass before it asks: a question costs as much as a hundred items of it."""
REST_SECONDS = 0.25
"""Between two questions of the background, where the first one failed."""
WAITING = 65536
"""Items that wait to be asked for in the background at most; more are left to later calls."""


class FeatureQuery:
    """Asks a store, through a cache of items if there is one (FLAME, Proximal Data Accelerator).

    Every question to the store is a task of its own, which no caller's end cancels: answers are never left unread, and
    others may be waiting for the same items.
    """

    def __init__(self, store: Store, config: CacheConfig) -> None:
        self._store, self._mode = store, config.mode
        self.cache = ItemCache(store.description.schema, config) if config.mode != "off" else None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._flights: dict[int, asyncio.Task[Fetched]] = {}
        self._waiting: dict[int, None] = {}
        self._refreshing = False
        self._rest_until = 0.0
        self.refreshed = 0

    async def fetch(self, user: str, candidates: np.ndarray) -> Fetched:
        """Features of a user and of int64[C] candidates, which may repeat.

        Raises:
            StoreError: the store doesn't answer, and its answer is waited for.
            CorruptRecord: a value is damaged or belongs to another key.
        """
        ids, place = np.unique(candidates, return_inverse=True)
        if self.cache is None:
            fetched = await self._ask(user, ids)
            return Fetched(fetched.user, fetched.items[place], fetched.found[place])
        held = self.cache.lookup(ids)
        if self._mode == "sync":
            return await self._fetch_sync(user, ids, place, held)
        return await self._fetch_async(user, ids, place, held)

    async def _fetch_sync(self, user: str, ids: np.ndarray, place: np.ndarray, held: Lookup) -> Fetched:
        """What is missing or too old comes with the user, or with whatever another call has asked for already."""
        lacking = ids[~held.fresh]
        flying = {item: self._flights[item] for item in lacking.tolist() if item in self._flights}
        if not flying:
            answer = await self._ask(user, lacking)
            held.rows[~held.fresh], held.found[~held.fresh] = answer.items, answer.found
            return Fetched(answer.user, held.rows[place], held.found[place])
        asked = np.array([item for item in lacking.tolist() if item not in flying], np.int64)
        waits = [self._ask(user, asked), *map(asyncio.shield, dict.fromkeys(flying.values()))]
        own, *others = await asyncio.gather(*waits, return_exceptions=True)
        if isinstance(own, BaseException):
            raise own
        answers = [own]
        for other in others:
            if isinstance(other, Fetched):
                answers.append(other)
            elif not isinstance(other, CorruptRecord):
                raise other
        if len(answers) <= len(others):  # a damaged record, perhaps their user's, who is none of ours
            answers.append(await self._ask(None, lacking))
        for fetched in answers:
            theirs = fetched.items["id"]
            common = np.isin(theirs, lacking, assume_unique=True)
            at = np.searchsorted(ids, theirs[common])
            held.rows[at], held.found[at] = fetched.items[common], fetched.found[common]
        return Fetched(own.user, held.rows[place], held.found[place])

    async def _fetch_async(self, user: str, ids: np.ndarray, place: np.ndarray, held: Lookup) -> Fetched:
        """What there is; the rest is asked for in the background."""
        if not held.fresh.all():
            self._refresh(ids[~held.fresh].tolist())
        record, lost = None, False
        try:
            record = (await self._ask(user, ids[:0])).user
        except StoreError as error:
            log.debug("scored without the user's record: %s", error)
            lost = True
        degraded = lost or not bool(held.fresh.all())
        found = held.found | ~held.known  # what has not been asked for is not known to lack
        return Fetched(record, held.rows[place], found[place], lost, degraded)

    def _ask(self, user: str | None, ids: np.ndarray, *, patient: bool = False) -> asyncio.Future[Fetched]:
        task = self._start(self._load(user, ids, patient))
        if self.cache is not None and not task.done():
            self._flights |= dict.fromkeys(ids.tolist(), task)
            task.add_done_callback(lambda done: self._landed(done, ids))
        return asyncio.shield(task)

    def _landed(self, task: asyncio.Task[Fetched], ids: np.ndarray) -> None:
        for item in ids.tolist():
            if self._flights.get(item) is task:
                del self._flights[item]

    async def _load(self, user: str | None, ids: np.ndarray, patient: bool) -> Fetched:
        fetched = await self._store.fetch(user, ids, patient=patient)
        if self.cache is not None and len(ids):
            self.cache.put(ids, fetched.items, fetched.found)
        return fetched

    def _refresh(self, items: Iterable[int]) -> None:
        room = WAITING - len(self._waiting)
        self._waiting |= dict.fromkeys(islice((item for item in items if item not in self._flights), room))
        if self._waiting and not self._refreshing and time.monotonic() >= self._rest_until:
            self._start(self._background())

    async def _background(self) -> None:
        self._refreshing = True
        try:
            while self._waiting:
                await asyncio.sleep(GATHER_SECONDS)
                wanted = list(islice(self._waiting, REFRESH))
                if len(wanted) == len(self._waiting):
                    self._waiting.clear()
                else:
                    for item in wanted:
                        del self._waiting[item]
                await self._refresh_these(np.sort(np.array(wanted, np.int64)))
        except StoreError as error:
            log.debug("items are not refreshed: %s", error)
            self._waiting.clear()  # whoever needs them still will say so again
            self._rest_until = time.monotonic() + REST_SECONDS
        finally:
            self._refreshing = False

    async def _refresh_these(self, ids: np.ndarray) -> None:
        """Fetch items; one that is damaged is not there for a while, and holds up no others."""
        assert self.cache is not None
        try:
            await self._ask(None, ids, patient=True)
        except CorruptRecord as error:
            if len(ids) > 1:
                for half in np.array_split(ids, 2):
                    await self._refresh_these(half)
                return
            log.error("item %d in store %s: %s", ids[0], self._store.name, error)
            self.cache.put(ids, self.cache.defaults(ids), np.zeros(1, bool))
        self.refreshed += len(ids)

    def _start[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
        if not task.done():
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be left to ask for it

    async def aclose(self) -> None:
        """Wait for what is under way, and release the store."""
        self._waiting.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.aclose()
