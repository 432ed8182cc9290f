"""Load on a dispatcher in process: requests at random moments whoever has been answered, or a fixed number inside."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.dso.plain import Plain
from bench.dso.systems import System, random_record
from bench.dso.traffic import Mix
from flame_jax.dso.scheduler import Refused
from flame_jax.dso.work import Done, Status

RECORDS = 256
"""Different requests of a mix; they come again and again."""
MOST = 1 << 20
"""Of them, in a closed loop."""
PATIENT = 120
"""Seconds after which a load is given up."""
_CODES = {status: code for code, status in enumerate(Status)}
PATIENCE = 1e6
"""Seconds that a request waits where nobody is refused."""


class Point(NamedTuple):
    """What one load did.

    Attributes:
        offered: requests per second.
        answered: of these, requests per second that were scored by their deadline.
        pairs: user-item pairs per second of these.
        ms: mean, p50, p99 and p99.9 from the moment a request was to come to its answer; with a deadline, from the
            moment it was handed in, as the deadline is.
        refused_ms: p99 of the time that a refusal took.
        outcomes: requests by how they ended.
        padding: part of all token rows that held no request.
        occupancy: part of the time for which a lane had a batch, averaged over lanes.
        requests_per_batch: on average; a request in pieces counts in each.
        host_us_per_batch: processor time of the dispatching and completing threads, filling slots included.
        host_us_per_request: processor time of handing a request in.
        behind_ms: how late requests were handed in (P99).
    """

    offered: float
    answered: float
    pairs: float
    ms: dict[str, float]
    refused_ms: float
    outcomes: dict[str, int]
    padding: float
    occupancy: float
    requests_per_batch: float
    host_us_per_batch: float
    host_us_per_request: float
    behind_ms: float


@dataclass
class _Tally:
    """Of every request, by ticket: when it was to come, when it was handed in, when it ended, and how."""

    due: np.ndarray
    handed: np.ndarray
    ended: np.ndarray
    status: np.ndarray
    batches: np.ndarray

    @classmethod
    def of(cls, count: int) -> _Tally:
        return cls(
            np.zeros(count), np.zeros(count), np.zeros(count), np.full(count, -1, np.int8), np.zeros(count, np.int32)
        )

    def answered(self, done: list[Done]) -> None:
        now = time.monotonic()
        for each in done:
            self.ended[each.ticket] = now
            self.status[each.ticket] = _CODES[each.status]
            self.batches[each.ticket] = each.batches

    def first(self, count: int) -> _Tally:
        return _Tally(
            self.due[:count], self.handed[:count], self.ended[:count], self.status[:count], self.batches[:count]
        )


class Load:
    """Sends requests of a mix to a system.

    Args:
        items: rows of its item table.
    """

    def __init__(self, system: System | Plain, mix: Mix, items: int) -> None:
        random, count = np.random.default_rng(1), len(mix.shapes)
        self._system, self._mix = system, mix
        self._records = [random_record(system.records, mix.shapes[n % count], items, random) for n in range(RECORDS)]
        self._candidates = np.array([mix.shapes[n % count].candidates for n in range(RECORDS)])
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers = 0

    def open(self, rate: float, seconds: float, *, patience: float = PATIENCE, seed: int = 0) -> Point:
        """Poisson arrivals for so long, and until the last is answered.

        Args:
            patience: seconds from the moment a request is handed in to its deadline. Of much more than the system can
                do, this process can't hand all in when it is to come.
        """
        random, count = np.random.default_rng(seed), max(32, int(rate * seconds))
        plan, which = np.cumsum(random.exponential(1 / rate, count)), random.integers(0, RECORDS, count)
        tally, books = self._begin(count)
        begun = time.monotonic()
        tally.due[:] = begun + plan
        spent = 0.0
        for ticket, (due, number) in enumerate(zip(tally.due.tolist(), which.tolist(), strict=True)):
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            spent += self._hand_in(tally, ticket, number, patience)
        self._wait(count)
        return self._point(tally, books, which, begun, spent, patience)

    def closed(self, inside: int, seconds: float) -> Point:
        """So many requests inside all the time: what the system can do."""
        which = np.random.default_rng(0).integers(0, RECORDS, MOST)
        numbers = which.tolist()
        tally, books = self._begin(MOST)
        begun, spent, count = time.monotonic(), 0.0, 0
        for ticket, number in enumerate(numbers):
            if ticket >= inside:
                self._wait(1)
            tally.due[ticket] = now = time.monotonic()
            if now > begun + seconds:
                break
            spent += self._hand_in(tally, ticket, number, PATIENCE)
            count = ticket + 1
        self._wait(min(inside - 1, count))
        return self._point(tally.first(count), books, which[:count], begun, spent, PATIENCE)

    def _begin(self, count: int) -> tuple[_Tally, dict[str, float]]:
        tally, self._answers, ended = _Tally.of(count), 0, queue.SimpleQueue[int]()
        self._ended = ended

        def answered(done: list[Done]) -> None:
            tally.answered(done)
            ended.put(len(done))

        self._system.answered = answered
        return tally, self._system.books()

    def _hand_in(self, tally: _Tally, ticket: int, number: int, patience: float) -> float:
        """Processor seconds that it took."""
        started = time.thread_time()
        tally.handed[ticket] = now = time.monotonic()
        try:
            self._system.submit(ticket, self._records[number], int((now + patience) * 1e9))
        except Refused:
            tally.ended[ticket], tally.status[ticket] = time.monotonic(), _CODES[Status.REFUSED]
            self._ended.put(1)
        return time.thread_time() - started

    def _wait(self, count: int) -> None:
        """For so many more answers."""
        while self._answers < count:
            try:
                self._answers += self._ended.get(timeout=PATIENT)
            except queue.Empty:
                raise RuntimeError(f"no request was answered for {PATIENT} s") from None
        self._answers -= count

    def _point(
        self,
        tally: _Tally,
        before: dict[str, float],
        which: np.ndarray,
        begun: float,
        spent: float,
        patience: float,
    ) -> Point:
        books = {name: value - before[name] for name, value in self._system.books().items()}
        count, seconds = len(tally.due), float(tally.ended.max()) - begun
        latency = tally.ended - (tally.due if patience == PATIENCE else tally.handed)
        ok, refused = tally.status == _CODES[Status.OK], tally.status == _CODES[Status.REFUSED]
        fine = ok & (tally.ended - tally.handed <= patience)
        batches = max(1.0, books["batches"])
        return Point(
            offered=count / seconds,
            answered=float(fine.sum()) / seconds,
            pairs=float(self._candidates[which][fine].sum()) / seconds,
            ms=_milliseconds(latency[ok]),
            refused_ms=_milliseconds((tally.ended - tally.handed)[refused])["p99"],
            outcomes={s.value: n for s, code in _CODES.items() if (n := int((tally.status == code).sum()))},
            padding=1 - books["rows"] / max(1.0, books["tokens"]),
            occupancy=books["busy_seconds"] / seconds / self._system.lanes,
            requests_per_batch=float(tally.batches.sum()) / batches,
            host_us_per_batch=books["thread_seconds"] / batches * 1e6,
            host_us_per_request=spent / count * 1e6,
            behind_ms=_milliseconds(tally.handed - tally.due)["p99"],
        )


def _milliseconds(seconds: np.ndarray) -> dict[str, float]:
    if not len(seconds):
        return dict.fromkeys(("mean", "p50", "p99", "p99.9"), float("nan"))
    shares: Sequence[Any] = np.percentile(seconds, [50, 99, 99.9]).tolist()
    return {name: s * 1e3 for name, s in zip(("mean", "p50", "p99", "p99.9"), [seconds.mean(), *shares], strict=True)}
