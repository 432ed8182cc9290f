"""The networked store: a server that speaks the Redis protocol, read in one round trip a request."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import random
import time
from collections.abc import Awaitable, Coroutine
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import numpy as np

from flame_jax.feature_config import StoreConfig
from flame_jax.pda.records import decode_items, decode_user, item_dtype, join_rows, user_dtype
from flame_jax.pda.store import Description, Fetched, StoreError
from flame_jax.pda.store_url import misfit, redacted

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.connection import AbstractConnection

log = logging.getLogger(__name__)

TRIES = 5
"""Calls in a row that fail until the store counts as down."""
PLAIN: dict[str, Any] = {"protocol": 2, "driver_info": None}
"""Nothing is asked of a server before the first question, but for a password: a round trip less, or three."""
LATE_SECONDS = 1.0
"""For a connection to be made, and for an answer that nobody waits for any more; then the connection is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds until one call is let through to a store that is down, doubled from time to time."""


class Keys(NamedTuple):
    """Names of values: a prefix, a letter for the kind, and the user's key in UTF-8 or the item's id in 8 bytes."""

    prefix: str

    def of(self, kind: str, key: bytes) -> bytes:
        """Of a user's record (`u`), an item's (`i`) or its title (`t`)."""
        return f"{self.prefix}:{kind}:".encode() + key

    def items(self, ids: np.ndarray) -> list[bytes]:
        """Of int64[n] items' records."""
        head = np.frombuffer(self.of("i", b""), np.uint8)
        names = np.empty((len(ids), len(head) + 8), np.uint8)
        names[:, : len(head)] = head
        names[:, len(head) :] = np.ascontiguousarray(ids, "<i8").view(np.uint8).reshape(-1, 8)
        found: list[bytes] = names.view(f"V{names.shape[1]}").ravel().tolist()
        return found

    @property
    def description(self) -> bytes:
        """Of the description."""
        return f"{self.prefix}:description".encode()

    @property
    def mark(self) -> bytes:
        """Of how far a copy has come that is not finished."""
        return f"{self.prefix}:loading".encode()


class Gate:
    """Tells calls at once that the store is down, but for one in a while that finds out.

    One call that fails says little; several, with no success since they began, close the gate, and any success opens
    it. Both are logged, and nothing in between.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._failures = 0
        self._pause = self._open_at = self._succeeded_at = 0.0

    def enter(self) -> float:
        """When the call began. Raises StoreError while the store counts as down."""
        now = time.monotonic()
        if self._pause:
            if now < self._open_at:
                raise StoreError(f"store {self._store} is down")
            self._wait(now, min(LONGEST_PAUSE, 2 * self._pause))
        return now

    def succeeded(self) -> None:
        """A call was answered in time."""
        if self._pause:
            log.warning("store %s answers again", self._store)
        self._failures, self._pause, self._succeeded_at = 0, 0.0, time.monotonic()

    def failed(self, begun: float, error: StoreError) -> None:
        """A call that began then was not."""
        if begun <= self._succeeded_at or self._pause:
            return
        self._failures += 1
        if self._failures >= TRIES:
            self._wait(time.monotonic(), FIRST_PAUSE)
            log.error("%s; it counts as down until it answers", error)

    def _wait(self, now: float, pause: float) -> None:
        self._pause, self._open_at = pause, now + pause * random.uniform(0.5, 1.0)


class RedisStore:
    """Reads a store that `flame_jax.data load` has filled. Made by `open`, in the event loop that uses it."""

    def __init__(self, client: Redis, name: str, config: StoreConfig, description: Description) -> None:
        self.name, self.description = name, description
        self._client, self._keys = client, Keys(config.prefix)
        self._seconds = config.timeout_ms / 1e3
        self._gate = Gate(name)
        schema = description.schema
        self._user_dtype, self._item_dtype = user_dtype(schema), item_dtype(schema)
        self._features = schema.stored_item_features

    @classmethod
    async def open(cls, config: StoreConfig) -> Self:
        """Connect and read the description.

        Raises:
            StoreError: redis-py is not installed, the server doesn't answer, or holds no finished store.
        """
        client, name = connect(config), redacted(config.url)
        try:
            blob = await _answer(client.get(Keys(config.prefix).description), 5 * LATE_SECONDS, name)
            return cls(client, name, config, Description.parse(blob, name))
        except BaseException:
            await client.aclose()
            raise

    async def fetch(self, user: str | None, item_ids: np.ndarray, *, patient: bool = False) -> Fetched:
        """See `Store.fetch`."""
        begun = time.monotonic() if patient else self._gate.enter()
        names = self._keys.items(item_ids)
        if user is not None:
            names.append(self._keys.of("u", user.encode()))
        try:
            seconds = max(LATE_SECONDS, self._seconds) if patient else self._seconds
            values = await _answer(self._client.mget(names), seconds, self.name) if names else []
        except StoreError as error:
            if not patient:
                self._gate.failed(begun, error)
            raise
        if names and time.monotonic() - begun <= self._seconds:
            self._gate.succeeded()
        blob = values.pop() if user is not None else None
        record = None if blob is None or user is None else decode_user(user, blob, self._user_dtype)
        rows = join_rows([value for value in values if value is not None], self._item_dtype, self._features)
        return Fetched(record, *decode_items(item_ids, rows, self._features))

    async def aclose(self) -> None:
        """See `Store.aclose`."""
        await self._client.aclose()


def connect(config: StoreConfig) -> Redis:
    """A client with a bounded pool; nothing is sent yet.

    Raises:
        StoreError: redis-py is not installed, or the URL is none.
    """
    seconds = config.timeout_ms / 1e3
    given = options(config.url, max(LATE_SECONDS, seconds))
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as Broken

    # Once: a connection of the pool may have died since it was used last.
    retry = Retry(NoBackoff(), 1, supported_errors=(Broken,))
    pool = BlockingConnectionPool.from_url(
        config.url,
        max_connections=config.connections,
        timeout=seconds,
        retry=retry,
        **given,
        **PLAIN,
    )
    kind: Any = pool.connection_class
    pool.connection_class = _packing(kind)
    return Redis.from_pool(pool)  # and closes it


@cache
def _packing(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """This class of connections, with questions packed by hiredis: for asyncio redis-py packs in Python, which takes a
    third of the time of a question for 128 items."""
    from redis.utils import HIREDIS_AVAILABLE

    if not HIREDIS_AVAILABLE:
        log.warning("hiredis is not installed: questions to the store take longer")
        return kind
    import hiredis

    class Packing(kind):  # type: ignore[misc, valid-type]
        def pack_command(self, *args: Any) -> list[bytes]:
            return [hiredis.pack_command(args)] if args[0] == "MGET" else super().pack_command(*args)

    return Packing


def options(url: str, seconds: float) -> dict[str, Any]:
    """What every client gets.

    Args:
        seconds: to connect, and for an answer if nobody else waits shorter.

    Raises:
        StoreError: redis-py is not installed, or the URL is none.
    """
    if importlib.util.find_spec("redis") is None:
        raise StoreError("a store at a URL needs redis-py: pip install 'flame-jax[redis]'")
    if reason := misfit(url):
        raise StoreError(f"store.url {redacted(url)}: {reason}")
    return {"socket_connect_timeout": seconds, "socket_timeout": seconds}


async def _answer(call: Awaitable[Any], seconds: float, name: str) -> Any:
    """Bytes, or a list of them.

    A call that is not answered in time goes on without us: a connection that is being made is then there for the next
    one, and an answer that comes late is read by whom it is for, instead of costing the connection.

    Raises:
        StoreError: no answer in time, or an error for one.
    """
    from redis.exceptions import RedisError

    asked = cast("Coroutine[Any, Any, Any]", call)
    task = asyncio.Task(asked, loop=asyncio.get_running_loop(), eager_start=True)
    task.add_done_callback(_retrieved)
    if not task.done():
        await asyncio.wait((task,), timeout=seconds)
    if not task.done():
        raise StoreError(f"store {name} does not answer within {seconds * 1e3:g} ms")
    try:
        return task.result()
    except (RedisError, OSError) as error:
        raise StoreError(f"store {name}: {told(error)}") from error


def told(error: Exception) -> str:
    """An error in words that may be logged: a server's own may repeat what it was sent, a password included."""
    from redis.exceptions import ResponseError

    return f"the server answers with {type(error).__name__}" if isinstance(error, ResponseError) else str(error)


def _retrieved(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
