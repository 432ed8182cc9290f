"""From a user and candidates to scores, as the server does it, with parts that can be taken away."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flame_jax.config import Config
from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.executor import Executor
from flame_jax.dso.start import make_scheduler
from flame_jax.dso.work import Status
from flame_jax.packing import Bucket, SlotLayout
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.page_lock import Memory, PageLock
from flame_jax.pda.query import FeatureQuery
from flame_jax.request import RankRequest
from flame_jax.server.live import Inbox
from flame_jax.vocabulary import Vocabularies
from flame_jax.workspace import BufferPool

NOW = 2_000_000_000
TIMEOUT_NS = 10**10
BATCH_SECONDS = 1e-3
"""What a batch is expected to take until the first have shown it."""


class Runs(Protocol):
    """What an executor needs of an engine."""

    @property
    def slots(self) -> Mapping[Bucket, SlotLayout]:
        """Layout by bucket."""

    def launch(self, bucket: Bucket, words: Any, hot: Any = None) -> Any:
        """See `Engine.launch`."""


class Trivial:
    """In place of a model: adds up what the slot holds."""

    def __init__(self, slots: Mapping[Bucket, SlotLayout], tasks: int) -> None:
        self.slots = slots
        self._programs = {
            bucket: jax.jit(lambda words, shape=(bucket.candidates, tasks): jnp.broadcast_to(words.sum(), shape) * 1.0)
            for bucket in slots
        }

    def launch(self, bucket: Bucket, words: Any, hot: Any = None) -> Any:
        """See `Runs.launch`."""
        return self._programs[bucket](words)


class FieldByField:
    """Brings each of a slot's fields to the device on its own, and joins them there."""

    def __init__(self, engine: Runs, device: jax.Device) -> None:
        self.slots, self._engine, self._device = engine.slots, engine, device
        self._joins = {
            bucket: jax.jit(lambda fields, slot=slot: _joined(fields, slot)) for bucket, slot in self.slots.items()
        }

    def launch(self, bucket: Bucket, words: Any, hot: Any = None) -> Any:
        """See `Runs.launch`."""
        fields = [jax.device_put(field, self._device) for field in self.slots[bucket].views(words).values()]
        return self._engine.launch(bucket, self._joins[bucket](fields))


def _joined(fields: list[jax.Array], slot: SlotLayout) -> jax.Array:
    ends = [*(field.offset for field in slot.fields[1:]), slot.words]
    parts = [
        jnp.pad(jax.lax.bitcast_convert_type(values, jnp.int32).ravel(), (0, end - field.offset - field.words))
        for field, end, values in zip(slot.fields, ends, fields, strict=True)
    ]
    return jnp.concatenate(parts)


class Pipeline:
    """One way to serve.

    Args:
        engine: runs the slots.
        tuned: page-locked slots, each brought as one copy; otherwise every field by itself from pageable memory.
    """

    def __init__(
        self,
        config: Config,
        vocabularies: Vocabularies,
        query: FeatureQuery,
        engine: Runs,
        device: jax.Device,
        *,
        tuned: bool,
    ) -> None:
        self._query = query
        records = BufferPool()
        self._assembler = Assembler(config.schema, vocabularies, pool=records)
        lock = PageLock(device)
        if not tuned:
            lock.memory, engine = Memory.PAGEABLE, FieldByField(engine, device)
        self.memory = lock.memory
        ladder = tuple(sorted(engine.slots))
        given: Any = engine
        executors = [
            Executor(given, bucket, self._assembler.layout, config.layout, lock)
            for bucket in ladder
            for _ in range(config.dispatch.executors)
        ]
        self._inbox = Inbox(asyncio.get_running_loop())
        scheduler = make_scheduler(
            dataclasses.replace(config.dispatch, max_queue=100_000),
            config.layout,
            {bucket: [BATCH_SECONDS] for bucket in ladder},
            shares=[1.0],
            lanes=1,
            on_left=records.give,
        )
        self._dispatcher = Dispatcher(
            [executors], scheduler, self._assembler.layout, on_done=self._inbox.deliver, on_fatal=lambda: None
        )

    async def rank(self, user: str, candidates: np.ndarray) -> bool:
        """Score; whether the answer is degraded."""
        fetched = await self._query.fetch(user, candidates)
        assembled = self._assembler.assemble(RankRequest(user, candidates, 0, NOW), fetched)
        ticket, future = self._inbox.open()
        self._dispatcher.submit(ticket, assembled.record, time.monotonic_ns() + TIMEOUT_NS)
        done = await future
        assert done.status is Status.OK, done.status
        return fetched.degraded

    def stop(self) -> None:
        """End its threads."""
        assert self._dispatcher.stop(10.0)
