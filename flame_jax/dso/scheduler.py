"""What is inside the dispatcher, without its threads: who waits, what runs where, and what is expected of both.

It has no clock and starts nothing: the dispatcher and the simulator tell it the time and do what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flame_jax.dso.batching import Batch
from flame_jax.dso.costs import OUTLIER, CostModel, Lead
from flame_jax.dso.flights import Flight, LaneState, Totals
from flame_jax.dso.policy import Launch, Policy, State, Wait
from flame_jax.dso.waiting import Queue, QueueLimit
from flame_jax.dso.work import Done, Part, Status, Work
from flame_jax.fke.buckets import Ladder, capacity
from flame_jax.packing import Bucket, Extent, Layout

SHOWN = 64
"""Requests that a policy is shown at most."""
ARRIVALS = 0.1
"""Seconds over which arrivals are averaged, about."""
RATE_WEIGHT = 0.05
"""Of one batch in the estimate of how fast the devices are."""
BROKEN = 3
"""A lane on which so many batches of other requests failed in a row is not used any more."""


class Refused(Exception):
    """A request is not taken on: it could not be answered in time, or there is no room for it."""


class NoLane(Refused):
    """Every lane is broken."""


@dataclass(frozen=True)
class Limits:
    """What may wait, and for how long.

    Attributes:
        max_queue: requests that may wait at most.
        target_wait: seconds of work. Where there always is more in the queue, no more may wait than is done in that
            time.
        shares: of the devices, per traffic class, when there is not enough for all.
    """

    max_queue: int = 1024
    target_wait: float = 0.02
    shares: tuple[float, ...] = (1.0,)


class View(NamedTuple):
    """What a policy is shown, and the requests behind it, in the same order."""

    state: State
    works: list[Work]


class Scheduler:
    """Keeps the books of one dispatcher. One thread at a time.

    Args:
        lanes: how many there are.
        depth: batches that may be on a lane at the same time: one that runs, others that wait on the device.
        lead: see `Lead`.
        on_left: told the record of a request that has left and that no batch reads any more; not of one that `submit`
            refused.

    Attributes:
        costs, depth: the same.
        totals: of the batches so far.
        works: requests inside, by ticket.
        expired, refused, retried: requests that left, or ran once more, for that reason.
    """

    def __init__(
        self,
        ladder: Ladder,
        layout: Layout,
        costs: CostModel,
        policy: Policy,
        limits: Limits,
        *,
        lanes: int,
        depth: int,
        lead: float = 0.0,
        on_left: Callable[[np.ndarray], None] = lambda record: None,
    ) -> None:
        self._ladder, self._layout, self.costs, self._policy = ladder, layout, costs, policy
        self.depth, self._on_left = depth, on_left
        self.lanes = [LaneState() for _ in range(lanes)]
        self.queue = Queue(limits.shares)
        self.limit = QueueLimit(target=limits.target_wait, floor=layout.max_requests * lanes, most=limits.max_queue)
        self._alive, self._lead = lanes, Lead(lead)
        self.totals = Totals()
        self.works: dict[int, Work] = {}
        self.launched: dict[Bucket, int] = dict.fromkeys(ladder, 0)
        self.expired = self.refused = self.retried = 0
        self._arrivals = self._arrived = 0.0
        self._came = 0  # since arrivals were last counted
        largest = ladder[-1]
        # Rows of the longest history that leaves room for a candidate.
        self._longest = (largest.tokens - 1) // layout.align * layout.align
        self._rows_per_second = largest.tokens * lanes / costs.seconds(largest, lanes)

    @property
    def in_flight(self) -> int:
        """Batches launched and not finished."""
        return sum(len(lane.flights) for lane in self.lanes)

    def backlog(self) -> float:
        """Seconds that the devices need for what waits, about."""
        return self.queue.rows / self._rows_per_second

    def running_since(self) -> float | None:
        """When the batch began that has run the longest; None where none runs."""
        begun = [max(lane.flights[0].launched, lane.finished) for lane in self.lanes if lane.flights]
        return min(begun, default=None)

    def submit(
        self, ticket: int, record: np.ndarray, extent: Extent, *, now: float, due: float, traffic_class: int
    ) -> list[Done]:
        """Let a request of these rows wait; the answer of one that had to make room for it, if any.

        Raises:
            Refused: there is no room, or no time; `NoLane` where nothing can run.
            ValueError: no bucket holds it.
        """
        if extent.candidates < 1 or extent.history > self._longest:
            raise ValueError(f"no bucket holds a request of {extent}")
        self._came += 1
        if not self._alive:
            raise NoLane
        victim: Work | None = None
        # First what costs the least: under overload most are refused here.
        if len(self.queue) >= self.limit.limit:
            victim = self.queue.most_over(traffic_class, self.limit.limit)
            if victim is None:
                self.refused += 1
                raise Refused
        work = Work(ticket, record, extent, since=now, due=due, traffic_class=traffic_class)
        if self._late(work, now):
            self.refused += 1
            raise Refused
        evicted: list[Done] = []
        if victim is not None:
            self.refused += 1
            evicted = self._leave([victim], Status.REFUSED)
        self.queue.add(work)
        self.works[ticket] = work
        return evicted

    def _late(self, work: Work, now: float) -> bool:
        """Whether it can't be answered in time. Where nothing waits it is tried: an estimate may be wrong."""
        if not self.queue.rows:
            return False
        # Mostly there is time for all that waits, and no need to look closer.
        most = self.backlog() + (self.depth + 1) * self.costs.seconds(self._ladder[-1], len(self.lanes))
        if now + most < work.due:
            return False
        ahead = self.queue.rows_before(work.due, work.traffic_class, by_share=self.limit.overloaded)
        begins = max(now, self._next_idle(now)) + ahead / self._rows_per_second
        return begins + self._fastest(work) > work.due

    def _fastest(self, work: Work) -> float:
        """Seconds that a request takes at least."""
        history, candidates = work.shown.extent
        for bucket in self._ladder:
            if capacity(bucket, history, self._layout) >= candidates:
                return self.costs.seconds(bucket, 1)
        return self.costs.seconds(self._ladder[-1], 1)

    def cancel(self, ticket: int) -> Work | None:
        """Nobody waits for it any more; what no batch has taken never runs. None: it is not here."""
        work = self.works.get(ticket)
        if work is not None:
            self._gone(work)
        return work

    def drop(self, now: float) -> list[Done]:
        """Take out what can't be answered in time any more; the answers."""
        expired = self.queue.due_by(now)
        self.expired += len(expired)
        doomed: list[Work] = []
        # While a lane is idle the first of them is tried: an estimate may be wrong.
        if all(lane.flights for lane in self.lanes if lane.alive):
            doomed = [work for work in self.queue.firsts() if work.due <= now + self._fastest(work)]
            self.refused += len(doomed)
        return self._leave(expired, Status.EXPIRED) + self._leave(doomed, Status.REFUSED)

    def view(self, now: float) -> View | None:
        """What a policy is shown; None where nothing waits, or nothing can be launched."""
        self._count_arrivals(now)
        open_lanes = [lane for lane in self.lanes if lane.alive]
        places = sum(self.depth - len(lane.flights) for lane in open_lanes)
        if not places or not len(self.queue):
            return None
        works = self.queue.front(SHOWN, by_share=self.limit.overloaded)
        idle = sum(not lane.flights for lane in open_lanes)
        state = State(
            now=now,
            waiting=[work.shown for work in works],
            arrivals=self._arrivals,
            places=places,
            idle=idle,
            busy=len(open_lanes) - idle,
            next_idle=self._next_idle(now),
            lead=self._lead.seconds,
        )
        return View(state, works)

    def decide(self, view: View) -> Launch | Wait:
        """What the policy says. Changes nothing."""
        return self._policy.decide(view.state)

    def take(self, batch: Batch, works: Sequence[Work], now: float) -> Flight | None:
        """A batch that the policy chose among these goes to a lane; None where all of it has gone meanwhile, or the
        lane."""
        open_lanes = [n for n, lane in enumerate(self.lanes) if lane.alive and len(lane.flights) < self.depth]
        if not open_lanes:
            return None
        parts, rows, useful = [], 0, 0.0
        again = any(works[position].alone for position, _ in batch.shares)
        for position, count in batch.shares:
            work = works[position]
            # Since the policy saw it, it was cancelled, or a batch with another part of it failed.
            if work.left or (work.alone and len(batch.shares) > 1):
                continue
            part = Part(work, *work.take(count))
            part_of_it = count / work.extent.candidates
            self.queue.served(work, part_of_it)
            rows += work.extent.history + count
            useful += part_of_it * work.rows
            parts.append(part)
        if not parts:
            return None
        number = min(open_lanes, key=lambda n: (len(self.lanes[n].flights), self.lanes[n].free_at))
        lane = self.lanes[number]
        busy = sum(bool(other.flights) for other in self.lanes if other is not lane) + 1
        flight = Flight(number, batch.bucket, parts, busy, bool(len(self.queue)), now, now, rows, useful, again)
        begins = now + self._lead.mean
        lane.free_at = max(begins, lane.free_at if lane.flights else begins) + self.costs.seconds(batch.bucket, busy)
        lane.flights.append(flight)
        self.launched[batch.bucket] += 1
        self.limit.observe(now, self.backlog(), len(parts))
        return flight

    def began(self, flight: Flight, now: float, *, first: bool) -> None:
        """A batch went to its lane, filled: the first of a decision, or one behind it. In the order of `take`.

        Of the thread that asks for views and decisions; no other looks at the lead.
        """
        if first:
            self._lead.observe(now - flight.decided)
        flight.launched = now

    def finished(self, flight: Flight, now: float) -> list[Done]:
        """A batch's scores are there; the answers of requests that it completed."""
        lane = self.lanes[flight.lane]
        began = max(flight.launched, lane.finished)
        self._off(flight, now)
        if lane.failures:
            lane.failures, lane.blamed = 0, set()
        # Behind a batch whose end was told late it seems to have taken no time at all.
        seconds = max(now - began, self.costs.seconds(flight.bucket, flight.busy) / OUTLIER)
        self.totals.batches += 1
        self.totals.rows += flight.rows
        self.totals.tokens += flight.bucket.tokens
        self.totals.busy_seconds += seconds
        self.costs.observe(flight.bucket, flight.busy, seconds)
        if flight.queued and flight.busy == self._alive:
            rate = flight.useful / seconds * self._alive
            self._rows_per_second += RATE_WEIGHT * (rate - self._rows_per_second)
        done: list[Done] = []
        for work, _, _ in flight.parts:
            self._ended(work)
            if not work.outstanding and not work.todo and not work.left:
                done.append(self._answer(work, Status.OK if work.finite else Status.NOT_FINITE))
        return done + self._stranded()

    def failed(self, flight: Flight, now: float, *, by_lane: bool) -> list[Done]:
        """A batch failed: a request that was alone in it has failed, the others run once more, each by itself.

        So does one that was alone on a lane that is broken. Where no lane is left, everybody has failed.

        Args:
            by_lane: on the device, so that the lane itself may be at fault.
        """
        lane = self._off(flight, now)
        if by_lane:
            # The same request in a row may be at fault itself.
            tickets = {part.work.ticket for part in flight.parts}
            lane.failures += not tickets & lane.blamed
            lane.blamed |= tickets
            self._set_alive(lane, lane.failures < BROKEN)
        lost: list[Work] = []
        for work, low, high in flight.parts:
            self._ended(work)
            if work.left:
                continue
            if len(flight.parts) == 1 and (flight.again or lane.alive):
                lost.append(work)
                continue
            self.retried += 1
            work.again(low, high)
            self.queue.add(work)
        return self._leave(lost, Status.FAILED) + self._stranded()

    def _stranded(self) -> list[Done]:
        """Everybody's answer where every lane is broken and nothing runs any more."""
        return [] if self._alive or self.in_flight else self.abandon()

    def revive(self, number: int) -> None:
        """A lane that was broken has been made anew."""
        self.lanes[number] = LaneState(alive=False)
        self._set_alive(self.lanes[number], True)

    def _set_alive(self, lane: LaneState, alive: bool) -> None:
        self._alive += alive - lane.alive
        lane.alive = alive

    def abandon(self) -> list[Done]:
        """Nothing will run any more: everybody's answer."""
        return self._leave(list(self.works.values()), Status.FAILED)

    def _off(self, flight: Flight, now: float) -> LaneState:
        lane = self.lanes[flight.lane]
        lane.flights.remove(flight)
        lane.finished = now
        lane.free_at = now + sum(self.costs.seconds(other.bucket, other.busy) for other in lane.flights)
        return lane

    def _leave(self, works: Sequence[Work], status: Status) -> list[Done]:
        return [self._answer(work, status) for work in works]

    def _answer(self, work: Work, status: Status) -> Done:
        self._gone(work)
        return work.done(status)

    def _gone(self, work: Work) -> None:
        work.left = True
        if work.queued:
            self.queue.remove(work)
        del self.works[work.ticket]
        if not work.outstanding:
            self._on_left(work.record)

    def _ended(self, work: Work) -> None:
        """A piece of it is under way no more."""
        work.outstanding -= 1
        if work.left and not work.outstanding:
            self._on_left(work.record)

    def _count_arrivals(self, now: float) -> None:
        """Those since the last time came evenly."""
        passed = max(now - self._arrived, 1e-9)
        new = -math.expm1(-passed / ARRIVALS)
        self._arrivals += new * (self._came / passed - self._arrivals)
        self._arrived, self._came = now, 0

    def _next_idle(self, now: float) -> float:
        return max(now, min((lane.free_at if lane.flights else now for lane in self.lanes if lane.alive), default=now))
