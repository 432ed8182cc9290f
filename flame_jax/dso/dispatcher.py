"""The dispatcher: one thread owns the queue, another completes what was launched.

    submit -> queue (deadline order) -> next_batch -> fill a slot -> launch -> wait -> scatter scores -> on_done

Requests enter as plain memory (a record) with an integer ticket and leave as a `Done`; nothing here knows of
gRPC or of an event loop.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from flame_jax.dso.batching import SCAN, Batch, next_batch
from flame_jax.dso.executor import Executor
from flame_jax.fke.buckets import Ladder, capacity
from flame_jax.packing import Extent, Layout
from flame_jax.record import Piece, RecordLayout

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The dispatcher already holds as many requests as it may."""


class Status(Enum):
    """How a request left the dispatcher."""

    OK = "ok"
    EXPIRED = "expired"
    FAILED = "failed"


class Done(NamedTuple):
    """One finished request.

    Attributes:
        scores: float32[C, tasks] in the request's candidate order; None unless OK.
        queue_ns: from submission to the first launch.
        assemble_ns: copying into slots, summed over its pieces.
        compute_ns: from the first launch to the last result; pieces overlap.
        batches: pieces it was scored in.
    """

    ticket: int
    status: Status
    scores: np.ndarray | None
    queue_ns: int
    assemble_ns: int
    compute_ns: int
    batches: int


class _Work:
    """A request inside the dispatcher."""

    __slots__ = (
        "assemble_ns", "batches", "cancelled", "compute_ns", "deadline_ns", "extent", "failed", "launched_ns",
        "outstanding", "queue_ns", "record", "scores", "served", "submitted_ns", "ticket",
    )  # fmt: skip

    def __init__(self, ticket: int, record: np.ndarray, extent: Extent, deadline_ns: int, tasks: int) -> None:
        self.ticket, self.record, self.extent, self.deadline_ns = ticket, record, extent, deadline_ns
        self.scores = np.empty((extent.candidates, tasks), np.float32)
        self.submitted_ns = time.monotonic_ns()
        self.served = self.outstanding = self.batches = 0
        self.queue_ns = self.assemble_ns = self.compute_ns = self.launched_ns = 0
        self.cancelled = self.failed = False

    def __lt__(self, other: _Work) -> bool:
        return (self.deadline_ns, self.ticket) < (other.deadline_ns, other.ticket)

    @property
    def remaining(self) -> Extent:
        return Extent(self.extent.history, self.extent.candidates - self.served)

    def done(self, status: Status) -> Done:
        scores = self.scores if status is Status.OK else None
        return Done(self.ticket, status, scores, self.queue_ns, self.assemble_ns, self.compute_ns, self.batches)


class _Flight(NamedTuple):
    """A launched batch."""

    executor: Executor
    parts: list[tuple[_Work, int, int]]
    launched_ns: int


class Dispatcher:
    """Batches, splits and runs requests.

    Args:
        executors: every executor, ready; their buckets must be the ladder's.
        on_done: called from the completion thread with all requests a batch finished; must not block.
        on_fatal: called once when a thread of the dispatcher dies; the process should end.
    """

    def __init__(
        self,
        executors: Sequence[Executor],
        ladder: Ladder,
        layout: Layout,
        records: RecordLayout,
        *,
        tasks: int,
        max_queue: int,
        on_done: Callable[[list[Done]], None],
        on_fatal: Callable[[], None],
    ) -> None:
        self._ladder, self._layout, self._records, self._tasks = ladder, layout, records, tasks
        self._free = {bucket: [e for e in executors if e.bucket == bucket] for bucket in ladder}
        self._max_flights = min(len(free) for free in self._free.values())
        if not self._max_flights:
            raise ValueError("every bucket needs an executor")
        self._max_queue, self._on_done, self._on_fatal = max_queue, on_done, on_fatal
        self._waiting: list[_Work] = []
        self._works: dict[int, _Work] = {}
        self._in_flight = 0
        self._stopping = self._dead = False
        self._changed = threading.Condition()
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self.launched: dict[str, int] = {str(bucket): 0 for bucket in ladder}
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"flame-{name}", daemon=True)
            for name, loop in (("dispatch", self._dispatch_loop), ("complete", self._complete_loop))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Requests waiting, in whole or in part."""
        return len(self._waiting)

    def submit(self, ticket: int, record: np.ndarray, deadline_ns: int) -> None:
        """Queue one request; `on_done` answers it unless it is cancelled first.

        Args:
            ticket: distinct among the requests inside; earlier ones go first among equal deadlines.
            record: see `flame_jax.record`; must not change until it is done.
            deadline_ns: on the clock of time.monotonic_ns().

        Raises:
            QueueFull: the queue is at its bound, or the dispatcher is stopping.
            ValueError: the record has no candidates, or too long a history for any bucket.
        """
        extent = self._records.extent(record)
        if min(extent.candidates, capacity(self._ladder[-1], extent.history, self._layout)) < 1:
            raise ValueError(f"no bucket holds a request of {extent}")
        work = _Work(ticket, record, extent, deadline_ns, self._tasks)
        with self._changed:
            if self._stopping or len(self._waiting) >= self._max_queue:
                raise QueueFull
            insort(self._waiting, work)
            self._works[ticket] = work
            self._changed.notify_all()

    def cancel(self, ticket: int) -> None:
        """Forget a request: what no batch has taken yet never runs, and `on_done` is not called for it."""
        with self._changed:
            work = self._works.pop(ticket, None)
            if work is not None:
                work.cancelled = True
                if work in self._waiting:
                    self._waiting.remove(work)

    def stop(self, seconds: float | None = None) -> bool:
        """Finish everything queued, then end both threads; False when they still run after `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException:
            log.critical("a dispatcher thread died", exc_info=True)
            self._die()

    def _die(self) -> None:
        """Take the other thread down and answer everybody who waits."""
        with self._changed:
            first, self._dead, self._stopping = not self._dead, True, True
            left = list(self._works.values())
            for work in left:
                work.cancelled = True
            self._works.clear()
            self._waiting.clear()
            self._changed.notify_all()
        self._flights.put(None)
        try:
            # First, so that whoever is answered finds another dispatcher in this one's place.
            if first:
                self._on_fatal()
        finally:
            if left:
                self._on_done([work.done(Status.FAILED) for work in left])

    def _dispatch_loop(self) -> None:
        while (flight := self._next_flight()) is not None:
            executor, parts = flight
            begun = time.monotonic_ns()
            try:
                executor.fill([Piece(work.record, low, high) for work, low, high in parts])
                launched = time.monotonic_ns()
                executor.launch()
            except Exception:
                log.exception("batch of bucket %s could not be launched", executor.bucket)
                self._release(executor, self._fail(parts))
                continue
            for work, _, _ in parts:
                work.assemble_ns += launched - begun
                if not work.launched_ns:
                    work.queue_ns, work.launched_ns = begun - work.submitted_ns, launched
            self.launched[str(executor.bucket)] += 1
            self._flights.put(_Flight(executor, parts, launched))
        self._flights.put(None)

    def _next_flight(self) -> tuple[Executor, list[tuple[_Work, int, int]]] | None:
        """Wait for work and a free executor; None once stopped and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        (self._waiting and self._in_flight < self._max_flights)
                        or self._dead
                        or (self._stopping and not self._waiting and not self._in_flight)
                    )
                )
                if not self._waiting or self._dead:
                    return None
                expired = self._drop_expired()
                if self._waiting:
                    batch = next_batch([work.remaining for work in self._waiting[:SCAN]], self._ladder, self._layout)
                    self._in_flight += 1
                    flight = self._free[batch.bucket].pop(), self._take(batch)
                else:
                    flight = None
            if expired:
                self._on_done(expired)
            if flight is not None:
                return flight

    def _drop_expired(self) -> list[Done]:
        """Take requests whose deadline has passed off the queue; what runs of them is not waited for."""
        now = time.monotonic_ns()
        count = 0
        while count < len(self._waiting) and self._waiting[count].deadline_ns <= now:
            count += 1
        dropped, self._waiting = self._waiting[:count], self._waiting[count:]
        for work in dropped:
            self._works.pop(work.ticket, None)
            work.cancelled = True
        return [work.done(Status.EXPIRED) for work in dropped]

    def _take(self, batch: Batch) -> list[tuple[_Work, int, int]]:
        parts = []
        for position, count in batch.shares:
            work = self._waiting[position]
            parts.append((work, work.served, work.served + count))
            work.served += count
            work.outstanding += 1
            work.batches += 1
        self._waiting = [work for work in self._waiting if work.served < work.extent.candidates]
        return parts

    def _complete_loop(self) -> None:
        while (flight := self._flights.get()) is not None:
            executor, parts, launched = flight
            try:
                pieces = executor.scores()
                finished = time.monotonic_ns()
                for (work, low, high), scores in zip(parts, pieces, strict=True):
                    work.scores[low:high] = scores
                    work.compute_ns = max(work.compute_ns, finished - (work.launched_ns or launched))
            except Exception:
                log.exception("batch of bucket %s failed", executor.bucket)
                self._release(executor, self._fail(parts))
                continue
            self._release(executor, self._finish(parts))

    def _release(self, executor: Executor, done: list[Done]) -> None:
        with self._changed:
            self._free[executor.bucket].append(executor)
            self._in_flight -= 1
            self._changed.notify_all()
        if done:
            self._on_done(done)

    def _finish(self, parts: list[tuple[_Work, int, int]]) -> list[Done]:
        finished = []
        with self._changed:
            for work, _, _ in parts:
                work.outstanding -= 1
                complete = not work.outstanding and work.served == work.extent.candidates
                if complete and not work.cancelled and not work.failed:
                    self._works.pop(work.ticket, None)
                    finished.append(work.done(Status.OK))
        return finished

    def _fail(self, parts: list[tuple[_Work, int, int]]) -> list[Done]:
        """Every request of a failed batch fails once, its unserved candidates with it."""
        failed = []
        with self._changed:
            for work, _, _ in parts:
                work.outstanding -= 1
                if not work.failed and not work.cancelled:
                    work.failed = True
                    self._works.pop(work.ticket, None)
                    failed.append(work.done(Status.FAILED))
            self._waiting = [work for work in self._waiting if not work.failed]
        return failed
