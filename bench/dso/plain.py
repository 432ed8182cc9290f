"""One call per request, with no policy, deadlines or batches: what a dispatcher is to be better than."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flame_jax.config import Config
from flame_jax.dso.executor import Executor
from flame_jax.dso.work import Done, Status
from flame_jax.packing import Bucket
from flame_jax.pda.page_lock import Memory, PageLock
from flame_jax.record import Piece, RecordLayout

IN_FLIGHT = 2
"""Calls on the device: one runs, the other follows it."""


class Plain:
    """Requests in the order in which they come, each by itself in the smallest bucket that holds it.

    One thread fills slots and launches, another one waits for scores.

    Args:
        engine: its ladder has a bucket for every request.
        page_locked: slots are, where the device copies them.
    """

    def __init__(self, config: Config, engine: Any, device: jax.Device, *, page_locked: bool) -> None:
        self.records, self.lanes = RecordLayout(config.schema), 1
        self.answered: Callable[[list[Done]], None] = lambda done: None
        self._layout, self._ladder = config.layout, sorted(engine.slots)
        lock = PageLock(device)
        if not page_locked and lock.memory is Memory.PAGE_LOCKED:
            lock.memory = Memory.PAGEABLE
        self._free: dict[Bucket, queue.SimpleQueue[Executor]] = {bucket: queue.SimpleQueue() for bucket in self._ladder}
        for bucket in self._ladder:
            for _ in range(IN_FLIGHT):
                self._free[bucket].put(Executor(engine, bucket, self.records, config.layout, lock))
        self._room = threading.Semaphore(IN_FLIGHT)
        self._coming: queue.SimpleQueue[tuple[int, np.ndarray] | None] = queue.SimpleQueue()
        self._running: queue.SimpleQueue[tuple[int, Executor, int, float] | None] = queue.SimpleQueue()
        self._totals = {"batches": 0.0, "rows": 0.0, "tokens": 0.0, "busy_seconds": 0.0}
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._launch, self._wait)]
        for thread in self._threads:
            thread.start()

    def submit(self, ticket: int, record: np.ndarray, deadline_ns: int) -> None:
        """See `Dispatcher.submit`; nobody is refused."""
        self._coming.put((ticket, record))

    def _launch(self) -> None:
        while (request := self._coming.get()) is not None:
            ticket, record = request
            extent = self.records.extent(record)
            history, candidates = self._layout.aligned_extent(extent)
            tokens = history + candidates
            bucket = next(b for b in self._ladder if b.tokens >= tokens and b.candidates >= candidates)
            self._room.acquire()
            executor = self._free[bucket].get()
            executor.fill([Piece(record, 0, extent.candidates)])
            executor.launch()
            self._running.put((ticket, executor, sum(extent), time.monotonic()))
        self._running.put(None)

    def _wait(self) -> None:
        ended = 0.0
        while (call := self._running.get()) is not None:
            ticket, executor, rows, launched = call
            (scored,) = executor.scores()
            began, ended = max(launched, ended), time.monotonic()
            self._free[executor.bucket].put(executor)
            self._room.release()
            for name, more in (("batches", 1), ("rows", rows), ("tokens", executor.bucket.tokens)):
                self._totals[name] += more
            self._totals["busy_seconds"] += ended - began
            self.answered([Done(ticket, Status.OK, scored.values, 0, 0, 0, 1)])

    def books(self) -> dict[str, float]:
        """As `System.books`."""
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in self._threads if thread.ident]
        return self._totals | {"thread_seconds": sum(time.clock_gettime(clock) for clock in clocks)}

    def costs(self) -> Mapping[Bucket, Sequence[float]]:
        """As `System.costs`: it goes by none."""
        return {}

    def stop(self) -> None:
        """End its threads."""
        self._coming.put(None)
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive(), "a call hangs"
