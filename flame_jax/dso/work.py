"""A request inside the dispatcher, and how it leaves."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np

from flame_jax.dso.policy import Waiting
from flame_jax.packing import Extent


class Status(Enum):
    """How a request left the dispatcher."""

    OK = "ok"
    EXPIRED = "expired"
    """Its deadline passed before it reached a device."""
    REFUSED = "refused"
    """It could not be answered in time, or there was no room for it."""
    NOT_FINITE = "not finite"
    """A score of its own is no number."""
    FAILED = "failed"


class Done(NamedTuple):
    """One finished request.

    Attributes:
        scores: float32[C, tasks] in the request's candidate order, for reading; None unless OK.
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


class Work:
    """A request inside the dispatcher. Times are seconds on the clock of time.monotonic().

    Attributes:
        rows: history and candidates, its size in estimates.
        todo: candidates [low, high) that no batch has taken yet.
        scores: float32[C, tasks], as far as they are there.
        finite: these are all numbers.
        shown: what a policy sees of it, while there is something to do.
        queued: it waits, in whole or in part.
        rows_left: of what no batch has taken yet, with the history; 0 where there is nothing.
        rows_counted: rows with which it counts in the queue.
        alone: it was in a batch that failed, and runs once more by itself.
        outstanding: pieces under way.
        left: it has been answered, or nobody waits for it any more.
    """

    __slots__ = (
        "alone", "assemble_ns", "batches", "compute_ns", "due", "extent", "finite", "launched_ns", "left",
        "outstanding", "queue_ns", "queued", "record", "rows", "rows_counted", "rows_left", "scores", "shown", "since",
        "ticket", "todo", "traffic_class",
    )  # fmt: skip

    def __init__(
        self,
        ticket: int,
        record: np.ndarray,
        extent: Extent,
        *,
        since: float,
        due: float,
        traffic_class: int,
    ) -> None:
        self.ticket, self.record, self.extent = ticket, record, extent
        self.rows = self.rows_left = extent.history + extent.candidates
        self.since, self.due, self.traffic_class = since, due, traffic_class
        self.scores: np.ndarray | None = None
        self.todo = [(0, extent.candidates)]
        self.outstanding = self.batches = self.rows_counted = 0
        self.queue_ns = self.assemble_ns = self.compute_ns = self.launched_ns = 0
        self.alone = self.left = self.queued = False
        self.finite = True
        self.shown = Waiting(extent, since, due)

    def take(self, count: int) -> tuple[int, int]:
        """The next `count` candidates [low, high) go into a batch."""
        low, high = self.todo[0]
        if low + count < high:
            self.todo[0] = low + count, high
        else:
            self.todo.pop(0)
        self._show()
        self.outstanding += 1
        self.batches += 1
        return low, low + count

    def put(self, low: int, values: np.ndarray, *, finite: bool) -> None:
        """Scores float32[count, tasks] of the candidates from `low` on are there, for reading; copied only if they are
        not all."""
        candidates = self.extent.candidates
        if len(values) == candidates:
            self.scores = values
        else:
            if self.scores is None:
                self.scores = np.empty((candidates, values.shape[1]), np.float32)
            # Under the dispatcher's lock: NumPy would give Python's away.
            memoryview(self.scores[low : low + len(values)]).cast("B")[:] = memoryview(values).cast("B")
        self.finite &= finite

    def again(self, low: int, high: int) -> None:
        """A batch with these candidates failed: they run once more, and share no batch with others."""
        self.alone = True
        self.todo.append((low, high))
        self._show()

    def _show(self) -> None:
        if not self.todo:
            self.rows_left = 0
        else:
            self.rows_left = self.extent.history + sum(high - low for low, high in self.todo)
            low, high = self.todo[0]
            self.shown = Waiting(Extent(self.extent.history, high - low), self.since, self.due, self.alone)

    def done(self, status: Status) -> Done:
        """What is told of it."""
        scores = self.scores if status is Status.OK else None
        return Done(self.ticket, status, scores, self.queue_ns, self.assemble_ns, self.compute_ns, self.batches)


class Part(NamedTuple):
    """Candidates [low, high) of a request in one batch."""

    work: Work
    low: int
    high: int
