"""A dispatcher without devices: the scheduler and its policy under simulated arrivals, batch times and lanes.

What decides is the code that serves; only time is made up. Lanes of one device slow each other down: a batch that takes
`costs.seconds(bucket, k)` while k lanes run one is done by a fraction of that in every moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flame_jax.dso.flights import Flight
from flame_jax.dso.policy import Costs, Launch
from flame_jax.dso.scheduler import Refused, Scheduler
from flame_jax.dso.work import Done, Status
from flame_jax.packing import Bucket, Extent

_NO_RECORD = np.zeros(0, np.int32)


class Arrival(NamedTuple):
    """A request comes.

    Attributes:
        time: seconds.
        patience: seconds until its deadline.
    """

    time: float
    extent: Extent
    patience: float = 1e9
    traffic_class: int = 0


class Ended(NamedTuple):
    """How a request left, and when."""

    arrival: Arrival
    status: Status
    time: float

    @property
    def latency(self) -> float:
        """Seconds from arrival to answer."""
        return self.time - self.arrival.time


class Ran(NamedTuple):
    """A batch that ran: `rows` of its bucket's tokens held requests."""

    lane: int
    bucket: Bucket
    begun: float
    ended: float
    rows: int
    requests: int


@dataclass
class Report:
    """What happened.

    Attributes:
        seconds: from the first arrival to the last answer.
    """

    ended: list[Ended] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    seconds: float = 0.0

    def answered(self) -> list[Ended]:
        """Requests that were scored."""
        return [end for end in self.ended if end.status is Status.OK]

    def in_time(self) -> list[Ended]:
        """Those of them that were scored by their deadline."""
        return [end for end in self.answered() if end.latency <= end.arrival.patience]

    def pairs_per_second(self) -> float:
        """User-item pairs scored by their deadline."""
        return sum(end.arrival.extent.candidates for end in self.in_time()) / self.seconds

    def latency(self, percentile: float) -> float:
        """Seconds, of the requests that were scored."""
        return float(np.percentile([end.latency for end in self.answered()], percentile))

    def mean_latency(self) -> float:
        """Seconds, of the requests that were scored."""
        return float(np.mean([end.latency for end in self.answered()]))

    def padding(self) -> float:
        """Part of all token rows that held no request."""
        return 1 - sum(ran.rows for ran in self.ran) / sum(ran.bucket.tokens for ran in self.ran)

    def occupancy(self, lanes: int) -> float:
        """Part of the time that lanes ran a batch."""
        return sum(ran.ended - ran.begun for ran in self.ran) / (lanes * self.seconds)


class Simulator:
    """Runs arrivals through a scheduler.

    Args:
        costs: what batches take in truth; the scheduler has estimates of its own.
        host: seconds that the dispatching thread takes to fill and launch a batch; it does one at a time.
    """

    def __init__(self, scheduler: Scheduler, costs: Costs, *, host: float = 0.0) -> None:
        self._scheduler, self._costs, self._host = scheduler, costs, host
        self._now = self._host_free = 0.0
        self._asleep_until = 0.0
        self._left: dict[int, float] = {}  # of flights, the part that is still to run
        self._begun: dict[int, float] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._report = Report()

    def run(self, arrivals: Iterable[Arrival]) -> Report:
        """Until every request has left.

        Args:
            arrivals: in the order of time.
        """
        coming = iter(arrivals)
        following = next(coming, None)
        first = following.time if following else 0.0
        self._now = self._host_free = first
        while following is not None or self._scheduler.works:
            ready, wake = self._launch()
            times = [ready, wake, self._next_end(), following.time if following else math.inf]
            if min(times) == math.inf:
                if not self._scheduler.works:  # the last ones were dropped
                    break
                raise RuntimeError("the policy leaves requests waiting for ever")
            self._advance(max(self._now, min(times)))
            while following is not None and following.time <= self._now:
                self._submit(following)
                following = next(coming, None)
        self._report.seconds = self._now - first
        return self._report

    def _running(self) -> list[Flight]:
        """The first of every lane, once the host has launched it."""
        firsts = [lane.flights[0] for lane in self._scheduler.lanes if lane.flights]
        return [flight for flight in firsts if flight.launched <= self._now + 1e-12]

    def _next_end(self) -> float:
        """When the next batch ends, or begins, if nothing else happens."""
        running = self._running()
        ends = [self._now + self._left[id(f)] * self._costs.seconds(f.bucket, len(running)) for f in running]
        firsts = [lane.flights[0] for lane in self._scheduler.lanes if lane.flights]
        begins = [f.launched for f in firsts if f not in running]
        return min((*ends, *begins), default=math.inf)

    def _advance(self, time: float) -> None:
        running = self._running()
        passed, self._now = time - self._now, time
        for flight in running:
            self._begun.setdefault(id(flight), time - passed)
            self._left[id(flight)] -= passed / self._costs.seconds(flight.bucket, len(running))
        for flight in running:
            if self._left[id(flight)] <= 1e-9:
                self._asleep_until = 0.0
                del self._left[id(flight)]
                begun = self._begun.pop(id(flight))
                self._report.ran.append(Ran(flight.lane, flight.bucket, begun, time, flight.rows, len(flight.parts)))
                self._end(self._scheduler.finished(flight, time))

    def _submit(self, arrival: Arrival) -> None:
        ticket = len(self._arrivals)
        self._arrivals[ticket] = arrival
        due, number = arrival.time + arrival.patience, arrival.traffic_class
        try:
            self._end(
                self._scheduler.submit(ticket, _NO_RECORD, arrival.extent, now=self._now, due=due, traffic_class=number)
            )
        except Refused:
            self._report.ended.append(Ended(arrival, Status.REFUSED, self._now))

    def _launch(self) -> tuple[float, float]:
        """Launch what the policy wants; when the host has time for more, and when the policy wants to be asked."""
        while True:
            if self._now < self._host_free:
                return self._host_free, math.inf
            if self._now < self._asleep_until:
                return math.inf, self._asleep_until
            self._end(self._scheduler.drop(self._now))
            view = self._scheduler.view(self._now)
            if view is None:
                return math.inf, math.inf
            decision = self._scheduler.decide(view)
            if not isinstance(decision, Launch):
                if not view.state.idle:  # as the dispatcher: what comes can't be run sooner
                    self._asleep_until = decision.until
                return math.inf, max(decision.until, self._now)
            for batch in decision.batches:
                flight = self._scheduler.take(batch, view.works, max(self._now, self._host_free))
                if flight is not None:
                    self._left[id(flight)] = 1.0
                    self._host_free = max(self._now, self._host_free) + self._host
                    self._scheduler.began(flight, self._host_free, first=True)

    def _end(self, done: list[Done]) -> None:
        self._report.ended += [Ended(self._arrivals[d.ticket], d.status, self._now) for d in done]
