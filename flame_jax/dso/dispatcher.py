"""The dispatcher's threads: one fills and launches batches, one per lane completes them, one looks out for a hang.

    submit -> Scheduler (queue, policy) -> fill a slot -> launch -> wait -> scatter scores -> on_done

Requests enter as plain memory (a record) with an integer ticket and leave as a `Done`; nothing here knows of
gRPC or of an event loop.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from flame_jax.dso.executor import Executor
from flame_jax.dso.flights import Flight
from flame_jax.dso.policy import Wait
from flame_jax.dso.scheduler import Refused, Scheduler
from flame_jax.dso.work import Done
from flame_jax.packing import Bucket
from flame_jax.record import Piece, RecordLayout

REBUILD = "flame-rebuild"
"""Name of the threads that make lanes anew."""
PATIENCE, MOST_PATIENCE = 1.0, 60.0
"""Seconds before a lane is made anew that broke a second time, twice as long each further time; and at most."""

log = logging.getLogger(__name__)

Rebuild = Callable[[int], Sequence[Executor]]
"""Makes the executors of a lane, by its number, anew."""


class _Launched(NamedTuple):
    flight: Flight
    executor: Executor
    launched_ns: int


class Dispatcher:
    """Batches, splits and runs requests.

    Args:
        lanes: per lane its executors, ready: `scheduler.depth` for each bucket.
        on_done: called from the dispatcher's threads with all requests that left at once; must not block.
        on_fatal: called once when a thread of the dispatcher dies, the device hangs, or no lane is left; the process
            should end.
        rebuild: makes a lane that broke anew; without it the others go on alone.
        hang_seconds: a batch that takes longer means that the device hangs.
    """

    def __init__(
        self,
        lanes: Sequence[Sequence[Executor]],
        scheduler: Scheduler,
        records: RecordLayout,
        *,
        on_done: Callable[[list[Done]], None],
        on_fatal: Callable[[], None],
        rebuild: Rebuild | None = None,
        hang_seconds: float = math.inf,
    ) -> None:
        self._scheduler, self._records = scheduler, records
        self._free = [self._by_bucket(executors) for executors in lanes]
        if len(lanes) != len(scheduler.lanes):
            raise ValueError(f"{len(lanes)} lanes, not {len(scheduler.lanes)}")
        self._on_done, self._on_fatal, self._rebuild, self._hang = on_done, on_fatal, rebuild, hang_seconds
        self._changes = 0
        self._wants_requests = True
        self._stopping = self._dead = False
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._rebuilding: set[int] = set()
        self._lost: set[int] = set()
        self._breaks = [0] * len(lanes)
        self._launched: list[queue.SimpleQueue[_Launched | None]] = [queue.SimpleQueue() for _ in lanes]
        loops: list[tuple[str, Callable[[], None]]] = [("dispatch", self._dispatch_loop)]
        if hang_seconds != math.inf:
            loops.append(("watch", self._watch_loop))
        loops += [(f"complete-{number}", self._completion(number)) for number in range(len(lanes))]
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"flame-{name}", daemon=True)
            for name, loop in loops
        ]
        for thread in self._threads:
            thread.start()

    def _by_bucket(self, executors: Sequence[Executor]) -> dict[Bucket, list[Executor]]:
        free: dict[Bucket, list[Executor]] = {bucket: [] for bucket in self._scheduler.launched}
        for executor in executors:
            free[executor.bucket].append(executor)
        if any(len(of_bucket) != self._scheduler.depth for of_bucket in free.values()):
            raise ValueError(f"every bucket needs {self._scheduler.depth} executors on each lane")
        return free

    @property
    def queued(self) -> int:
        """Requests waiting, in whole or in part."""
        return len(self._scheduler.queue)

    @property
    def lanes_alive(self) -> int:
        """Lanes in use."""
        return sum(lane.alive for lane in self._scheduler.lanes)

    @property
    def launched(self) -> Mapping[Bucket, int]:
        """Batches so far, by bucket."""
        return self._scheduler.launched

    @property
    def thread_seconds(self) -> float:
        """Processor time of its threads so far, before it stops."""
        alive = [thread.ident for thread in self._threads if thread.ident and thread.is_alive()]
        clocks = [time.pthread_getcpuclockid(ident) for ident in alive]
        return sum(time.clock_gettime(clock) for clock in clocks)

    @property
    def scheduler(self) -> Scheduler:
        """Its books, for reading."""
        return self._scheduler

    def submit(self, ticket: int, record: np.ndarray, deadline_ns: int, traffic_class: int = 0) -> None:
        """Queue one request; `on_done` answers it unless it is cancelled first.

        Args:
            ticket: distinct among the requests inside; earlier ones go first among equal deadlines.
            record: see `flame_jax.record`; must not change until it is done.
            deadline_ns: on the clock of time.monotonic_ns().
            traffic_class: index into the shares of the scheduler's limits.

        Raises:
            Refused: there is no room, or no time, for it, or the dispatcher is stopping.
            NoLane: nothing can run; a `Refused`, too.
            ValueError: the record has no candidates, or too long a history for any bucket.
        """
        now, due, extent = time.monotonic(), deadline_ns / 1e9, self._records.extent(record)
        with self._changed:
            if self._stopping:
                raise Refused
            evicted = self._scheduler.submit(ticket, record, extent, now=now, due=due, traffic_class=traffic_class)
            if self._wants_requests:
                self._notify()
        if evicted:
            self._on_done(evicted)

    def cancel(self, ticket: int) -> None:
        """Forget a request: what no batch has taken yet never runs, and `on_done` is not called for it."""
        with self._changed:
            if self._scheduler.cancel(ticket) is not None:
                self._notify()

    def stop(self, seconds: float | None = None) -> bool:
        """Finish everything queued, then end the threads; False when one still runs after `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._stopping = True
            self._notify()
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _notify(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException:
            log.critical("a dispatcher thread died", exc_info=True)
            self._die()

    def _die(self) -> None:
        """Take the other threads down and answer everybody who waits."""
        with self._changed:
            first, self._dead, self._stopping = not self._dead, True, True
            left = self._scheduler.abandon()
            self._notify()
        self._ended.set()
        try:
            # First, so that whoever is answered finds another dispatcher in this one's place.
            if first:
                self._on_fatal()
        finally:
            if left:
                self._on_done(left)

    def _dispatch_loop(self) -> None:
        try:
            while self._launch_next():
                pass
        finally:
            # Behind everything that was launched: no batch may be left that nobody waits for.
            self._ended.set()
            for launched in self._launched:
                launched.put(None)

    def _launch_next(self) -> bool:
        """One decision's batches; False once stopped. Its frame ends, and with it what holds their requests."""
        batches = self._next_batches()
        if batches is None:
            return False
        for number, (flight, executor) in enumerate(batches):
            self._launch(flight, executor, first=number == 0)
        return True

    def _next_batches(self) -> list[tuple[Flight, Executor]] | None:
        """Wait until something is to be launched; None once stopped and empty, or dead."""
        while True:
            with self._changed:
                seen, now = self._changes, time.monotonic()
                dropped = self._scheduler.drop(now)
                view = self._scheduler.view(now)
                nothing = self._stopping and not self.queued and not self._scheduler.in_flight
                if self._dead or (nothing and not dropped):
                    return None
                if view is None and not dropped:
                    self._wait(seen, math.inf, not self.queued)
            if dropped:
                self._on_done(dropped)
            if view is None:
                continue
            # The policy takes longer than anybody who submits should wait.
            decision = self._scheduler.decide(view)
            with self._changed:
                if isinstance(decision, Wait):
                    # While no lane is idle, what comes can't be run sooner.
                    self._wait(seen, decision.until, view.state.idle > 0)
                    continue
                flights = [self._scheduler.take(batch, view.works, now) for batch in decision.batches]
                return [(flight, self._free[flight.lane][flight.bucket].pop()) for flight in flights if flight]

    def _wait(self, seen: int, until: float, wants_requests: bool) -> None:
        """Until something changes after `seen`, or so long."""
        self._wants_requests = wants_requests
        timeout = None if until == math.inf else max(0.0, until - time.monotonic())
        self._changed.wait_for(lambda: self._changes != seen, timeout)
        self._wants_requests = True

    def _launch(self, flight: Flight, executor: Executor, *, first: bool) -> None:
        begun = time.monotonic_ns()
        try:
            executor.fill([Piece(work.record, low, high) for work, low, high in flight.parts])
        except Exception:
            log.exception("batch of bucket %s could not be filled", flight.bucket)
            self._failed(flight, executor, by_lane=False)
            return
        launched = time.monotonic_ns()
        try:
            executor.launch()
        except Exception:
            log.exception("batch of bucket %s could not be launched", flight.bucket)
            self._failed(flight, executor, by_lane=True)
            return
        for work, _, _ in flight.parts:
            work.assemble_ns += launched - begun
            if not work.launched_ns:
                work.queue_ns, work.launched_ns = begun - int(work.since * 1e9), launched
        # Launching counts as a batch's time, as it does in calibration: on a CPU it may be all of it.
        self._scheduler.began(flight, launched / 1e9, first=first)
        self._launched[flight.lane].put(_Launched(flight, executor, launched))

    def _completion(self, number: int) -> Callable[[], None]:
        def loop() -> None:
            while (launched := self._launched[number].get()) is not None:
                self._complete(*launched)
                del launched  # it would hold its requests until there is another batch

        return loop

    def _complete(self, flight: Flight, executor: Executor, launched_ns: int) -> None:
        try:
            scores = executor.scores()
        except Exception:
            log.exception("batch of bucket %s failed", flight.bucket)
            self._failed(flight, executor, by_lane=True)
            return
        with self._changed:
            finished_ns = time.monotonic_ns()
            for (work, low, _), (values, finite) in zip(flight.parts, scores, strict=True):
                work.put(low, values, finite=finite)
                work.compute_ns = max(work.compute_ns, finished_ns - (work.launched_ns or launched_ns))
            self._free[flight.lane][flight.bucket].append(executor)
            done = self._scheduler.finished(flight, finished_ns / 1e9)
            self._notify()
        self._left(flight.lane, done)

    def _failed(self, flight: Flight, executor: Executor, *, by_lane: bool) -> None:
        with self._changed:
            self._free[flight.lane][flight.bucket].append(executor)
            done = self._scheduler.failed(flight, time.monotonic(), by_lane=by_lane)
            self._notify()
        self._left(flight.lane, done)

    def _left(self, number: int, done: list[Done]) -> None:
        """A batch has left a lane, and some requests have left with it."""
        lane = self._scheduler.lanes[number]
        with self._changed:
            broken = not lane.alive and not lane.flights and number not in self._rebuilding and not self._dead
            if broken:
                self._rebuilding.add(number)
        try:
            if broken:
                self._replace(number)
        finally:
            if done:
                self._on_done(done)

    def _replace(self, number: int) -> None:
        """A lane is broken and has run empty."""
        if self._rebuild is None:
            log.error("lane %d is broken; %d are left", number, self.lanes_alive)
            self._give_up(number)
            return
        log.error("lane %d is broken and is made anew", number)
        work = partial(self._guard, partial(self._revive, number, self._rebuild))
        thread = threading.Thread(target=work, name=REBUILD, daemon=True)
        with self._changed:
            self._threads.append(thread)
        thread.start()

    def _revive(self, number: int, rebuild: Rebuild) -> None:
        self._breaks[number] += 1
        if self._ended.wait(min(MOST_PATIENCE, PATIENCE * (2 ** (self._breaks[number] - 1) - 1))):
            return
        try:
            free = self._by_bucket(rebuild(number))
        except Exception:
            log.exception("lane %d can't be made anew", number)
            self._give_up(number)
            return
        with self._changed:
            self._free[number] = free
            self._scheduler.revive(number)
            self._rebuilding.discard(number)
            self._notify()
        log.warning("lane %d is back", number)

    def _give_up(self, number: int) -> None:
        """A lane will not come back."""
        with self._changed:
            self._lost.add(number)
            last = len(self._lost) == len(self._scheduler.lanes)
        if last:
            self._die()

    def _watch_loop(self) -> None:
        before: float | None = None
        while not self._ended.wait(min(1.0, self._hang / 4)):
            with self._changed:
                since = self._scheduler.running_since()
            hangs = since is not None and time.monotonic() - since > self._hang
            # Seen twice: a process that was stopped and goes on may find its batches done a moment later.
            if hangs and since == before:
                log.critical("a batch runs for more than %g s: the device hangs", self._hang)
                self._die()
                return
            before = since if hangs else None
