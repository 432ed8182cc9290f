"""A device of a few lanes as a tiny event loop, a policy run on it, and every schedule tried on it.

Lanes slow each other: while `busy` lanes run, a batch of `bucket` gets on at 1 / seconds(bucket, busy). All requests
are there at time 0, places are idle lanes, and a request whose due time passes while some of it waits is dropped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

from flame_jax.dso.batching import Batch
from flame_jax.dso.policy import Launch, Policy, State, Waiting
from flame_jax.fke.buckets import Ladder
from flame_jax.packing import Bucket, Extent, Layout, fits

LAYOUT = Layout(align=1, max_requests=3)
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Table:
    """Costs by hand: seconds of a bucket by itself, times a factor for so many busy lanes."""

    alone: Mapping[Bucket, float]
    factor: tuple[float, ...] = (1.0, 1.0)

    def seconds(self, bucket: Bucket, busy: int) -> float:
        return self.alone[bucket] * self.factor[busy - 1]


class Request(NamedTuple):
    history: int
    candidates: int
    due: float = math.inf


class Case(NamedTuple):
    """Requests in order of urgency, and what serves them."""

    requests: tuple[Request, ...]
    ladder: Ladder
    costs: Table
    lanes: int


class Running(NamedTuple):
    left: float
    bucket: Bucket
    requests: tuple[int, ...]


class Outcome(NamedTuple):
    """Requests that were late or dropped, and the seconds that requests spent until they were done or dropped."""

    late: int
    total: float


NOTHING = Outcome(0, 0.0)


class Moment(NamedTuple):
    """The device at one time.

    Attributes:
        left: candidates that no batch has taken, of each request; 0 if it was dropped.
        open: requests that are neither done nor dropped.
        fresh: nothing has been launched at this time.
    """

    now: float
    left: tuple[int, ...]
    open: frozenset[int]
    running: tuple[Running, ...] = ()
    fresh: bool = True
    outcome: Outcome = NOTHING

    @staticmethod
    def first(case: Case) -> Moment:
        left = tuple(request.candidates for request in case.requests)
        return Moment(0.0, left, frozenset(range(len(left))))

    def launch(self, shares: Sequence[tuple[int, int]], bucket: Bucket) -> Moment:
        left = list(self.left)
        for number, count in shares:
            assert 0 < count <= left[number]
            left[number] -= count
        running = (*self.running, Running(1.0, bucket, tuple(number for number, _ in shares)))
        return self._replace(left=tuple(left), running=running, fresh=False)

    def step(self, case: Case) -> Moment:
        """On to the next end of a batch."""
        seconds = [case.costs.seconds(batch.bucket, len(self.running)) for batch in self.running]
        took = min(batch.left * whole for batch, whole in zip(self.running, seconds, strict=True))
        moved = [b._replace(left=b.left - took / whole) for b, whole in zip(self.running, seconds, strict=True)]
        running = tuple(batch for batch in moved if batch.left > TOLERANCE)
        inside = {number for batch in running for number in batch.requests}
        now, left, (late, total) = self.now + took, list(self.left), self.outcome
        still = set(self.open)
        for number in self.open:
            due = case.requests[number].due
            if left[number] and due <= now + TOLERANCE:
                left[number] = 0
                late += 1
                still.remove(number)
            elif not left[number] and number not in inside:
                late += now > due + TOLERANCE
                still.remove(number)
        return Moment(now, tuple(left), frozenset(still), running, True, Outcome(late, total + took * len(self.open)))


def run(policy: Policy, case: Case) -> Outcome:
    """What comes of a policy that must always launch while a lane is idle."""
    moment = Moment.first(case)
    while moment.open:
        idle = case.lanes - len(moment.running)
        numbers = sorted((n for n in moment.open if moment.left[n]), key=lambda n: case.requests[n].due)
        if not idle or not numbers:
            moment = moment.step(case)
            continue
        extents = [Extent(case.requests[n].history, moment.left[n]) for n in numbers]
        waiting = [Waiting(extent, 0.0, case.requests[n].due) for extent, n in zip(extents, numbers, strict=True)]
        decision = policy.decide(State(moment.now, waiting, 0.0, idle, idle, len(moment.running), moment.now))
        assert isinstance(decision, Launch)
        assert 0 < len(decision.batches) <= idle
        for batch in decision.batches:
            assert fits(pieces(batch, extents), batch.bucket, LAYOUT)
            moment = moment.launch([(numbers[position], count) for position, count in batch.shares], batch.bucket)
    return moment.outcome


def pieces(batch: Batch, waiting: Sequence[Extent]) -> list[Extent]:
    return [Extent(waiting[position].history, count) for position, count in batch.shares]


def fewest_late(case: Case, *, urgent_first: bool = False) -> int:
    """Of all schedules, or of those whose launches begin with the most urgent request that waits."""
    return int(_least(case, lambda outcome: outcome.late, urgent_first))


def least_total(case: Case, *, urgent_first: bool = False) -> float:
    """The smallest sum of completion times when nothing is ever late."""
    requests = tuple(request._replace(due=math.inf) for request in case.requests)
    return _least(case._replace(requests=requests), lambda outcome: outcome.total, urgent_first)


def _least(case: Case, value: Callable[[Outcome], float], urgent_first: bool) -> float:
    """The least value of any schedule: at every end of a batch, every batch or none for each idle lane.

    More candidates in the same bucket are never worse, so that only batches that can't grow are tried.
    """
    loads = cache(lambda left: tuple(_fullest(case, left)))
    dated = any(request.due < math.inf for request in case.requests)
    known: dict[object, float] = {}

    def from_here(moment: Moment) -> float:
        if not moment.open:
            return 0.0
        running = tuple(sorted(batch._replace(left=round(batch.left, 9)) for batch in moment.running))
        key = round(moment.now, 9) if dated else 0.0, moment.left, moment.open, running, moment.fresh
        if key not in known:
            options = []
            if moment.running:
                after = moment.step(case)
                options.append(value(after.outcome) + from_here(after._replace(outcome=NOTHING)))
            elif dated:
                options.append(float(len(moment.open)))
            if len(moment.running) < case.lanes:
                first = next((number for number, left in enumerate(moment.left) if left), None)
                bound = urgent_first and moment.fresh
                options += [
                    from_here(moment.launch(shares, bucket))
                    for bucket, shares in loads(moment.left)
                    if not bound or shares[0][0] == first
                ]
            known[key] = min(options)
        return known[key]

    return from_here(Moment.first(case))


def _fullest(case: Case, left: tuple[int, ...]) -> Iterator[tuple[Bucket, tuple[tuple[int, int], ...]]]:
    """Buckets and shares of which none can grow."""
    for bucket in case.ladder:
        fitting = {counts for counts in product(*(range(count + 1) for count in left)) if _fit(case, counts, bucket)}
        for counts in fitting:
            larger = ((*counts[:n], count + 1, *counts[n + 1 :]) for n, count in enumerate(counts))
            if any(counts) and not any(grown in fitting for grown in larger):
                yield bucket, tuple((n, count) for n, count in enumerate(counts) if count)


def _fit(case: Case, counts: tuple[int, ...], bucket: Bucket) -> bool:
    extents = [Extent(request.history, n) for request, n in zip(case.requests, counts, strict=True) if n]
    return fits(extents, bucket, LAYOUT)


LADDERS = (
    (Bucket(4, 2), Bucket(8, 4)),
    (Bucket(3, 2), Bucket(6, 4), Bucket(10, 6)),
    (Bucket(2, 1), Bucket(4, 2), Bucket(8, 4)),
)
# Seconds of so many tokens: mostly a fixed part, some of each, no fixed part.
PRICES = (lambda tokens: 3 + tokens / 4, lambda tokens: 1 + tokens / 2, float)


def cases(seed: int, count: int, *, dated: bool, equal: bool = False) -> Iterator[Case]:
    """Drawn cases of one to four requests; with `equal` they are of one size, which every bucket holds."""
    draw = random.Random(seed)
    for _ in range(count):
        ladder, price, factor = draw.choice(LADDERS), draw.choice(PRICES), draw.choice((1.0, 1.3, 1.6))
        costs = Table({bucket: price(bucket.tokens) for bucket in ladder}, (1.0, factor))
        sizes = [(draw.randint(0, 3), draw.randint(1, 4)) for _ in range(draw.randint(1, 4))]
        if equal:
            sizes = [(draw.randint(0, 1), 1)] * len(sizes)
        due = sorted(float(draw.randint(2, 20)) if dated else math.inf for _ in sizes)
        requests = tuple(Request(*size, time) for size, time in zip(sizes, due, strict=True))
        yield Case(requests, ladder, costs, draw.choice((1, 2)))
