"""Ways to serve a backlog, and what each costs: how many requests are late, and how long they take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flame_jax.dso.backlog import Backlog, Load
from flame_jax.dso.batching import Item
from flame_jax.dso.policy import Costs
from flame_jax.fke.buckets import Ladder
from flame_jax.packing import Bucket

FEW = 4
"""So many waiting requests are worth laying out to the last; of more, what comes later is taken to flow evenly."""


Prices = list[tuple[float, Bucket]]
"""Seconds of each bucket, the cheapest first."""


NEAR = 0.8
"""Of the best rate of tokens, at which a bucket is worth a try when much waits."""


class Lanes(NamedTuple):
    """What a launch finds.

    Attributes:
        start: when its batches begin to run, in seconds from now.
        free: lanes that take one each.
        busy: lanes that run something else meanwhile.
        arrivals: requests per second that come meanwhile.
    """

    start: float
    free: int
    busy: int
    arrivals: float


class Plan(NamedTuple):
    """A launch and what comes of it.

    Attributes:
        late: requests that could be in time and are not.
        included: those of them that the launch finishes.
        cost: seconds that requests spend from now on, those that wait and those to come, summed.
        loads: what is launched now, and the buckets.
        rest: whether something waits for another launch.
    """

    late: int
    included: int
    cost: float
    loads: list[tuple[Load, Bucket]]
    rest: bool


class Planner:
    """Plays out ways to serve a backlog.

    Args:
        backlog: whatever can't be in time is moved behind the others.
        lanes: at least one free.
    """

    def __init__(self, backlog: Backlog, ladder: Ladder, costs: Costs, lanes: Lanes) -> None:
        self._backlog, self._ladder, self._costs, self._lanes = backlog, ladder, costs, lanes
        self._earliest = min(backlog.due)
        self._prices: dict[int, Prices] = {}
        self._put_off_hopeless()

    def prices(self, launched: int) -> Prices:
        """What buckets cost with so many launched at once."""
        prices = self._prices.get(launched)
        if prices is None:
            busy, seconds = self._lanes.busy + launched, self._costs.seconds
            prices = self._prices[launched] = sorted((seconds(bucket, busy), bucket) for bucket in self._ladder)
        return prices

    def best(self) -> Plan:
        """Fewest late, fewest of them in the launch, least cost, then the largest bucket."""
        best = min(self._in_order(), key=_rank)
        items, free = len(self._backlog.items), self._lanes.free
        if items <= FEW:
            for count in range(2, min(free, items) + 1):
                loads = self._backlog.spread(count)
                if loads is not None:
                    best = min(best, self._play(loads, [], []), key=_rank)
        return best

    def _put_off_hopeless(self) -> None:
        """Move those behind that would be late even by themselves; when they are done matters no longer."""
        backlog = self._backlog
        if self._earliest >= self._lanes.start + self.prices(1)[-1][0] and backlog.holds_all:
            return
        timely: list[Item] = []
        hopeless: list[Item] = []
        prices, start = self.prices(1), self._lanes.start
        for item in backlog.items:
            position, history, rows = item
            left = backlog.due[position] - start
            possible = cheapest(prices, history + rows, rows)[0] <= left or self._soonest(history, rows) <= left
            (timely if possible else hopeless).append(item)
        if hopeless:
            backlog.items = timely + hopeless
            for position, _, _ in hopeless:
                backlog.due[position] = math.inf
            self._earliest = min(backlog.due)

    def _soonest(self, history: int, rows: int) -> float:
        """Seconds of a request that has all free lanes for itself, in pieces of equal size and a last one."""
        soonest = math.inf
        for tokens, candidates in self._ladder:
            room = min(candidates, tokens - history)
            if room <= 0:
                continue
            full, rest = divmod(rows, room)
            width = min(self._lanes.free, full + (rest > 0))
            prices = self.prices(width)
            seconds = -(-full // width) * cheapest(prices, history + room, room)[0] if full else 0.0
            if rest and full % width == 0:
                seconds += cheapest(prices, history + rest, rest)[0]
            soonest = min(soonest, seconds)
        return soonest

    def _in_order(self) -> Iterator[Plan]:
        """For each bucket: a launch of batches no larger; what is left then in batches of the best rate.

        When few wait, also what is left in batches no larger.
        """
        backlog, free = self._backlog, self._lanes.free
        launches: list[tuple[int, list[Load], list[Item]]] = []
        for cap in self._caps():
            now, rest = backlog.pack(backlog.items, cap, free)
            if not launches or now != launches[-1][1]:
                launches.append((cap, now, rest))
            if not rest and len(now) == 1:
                break
        few = len(backlog.items) <= FEW
        fastest = max(launches, key=lambda launch: self._rate(launch[1]))[0]
        for cap, now, rest in reversed(launches):
            for tail in {fastest, cap} if few and rest else (fastest,):
                yield self._play(now, *backlog.pack(rest, tail, 2 * FEW if few else 1))

    def _caps(self) -> Sequence[int]:
        """Buckets worth a try: those that do not cut the first request for nothing, or, where more waits than the
        largest hold and nobody is in a hurry, those that are not far from the best rate. With a long queue nothing else
        makes up for a slow launch."""
        tokens = self._ladder[-1].tokens * self._lanes.free
        prices = self.prices(self._lanes.free)
        slowest = max(price[0] for price in prices)
        if self._backlog.tokens <= tokens or self._earliest <= self._lanes.start + 2 * slowest:
            return self._cutting_for_something()
        rates = {bucket: bucket.tokens / seconds for seconds, bucket in prices}
        enough = NEAR * max(rates.values())
        return [cap for cap, bucket in enumerate(self._ladder) if rates[bucket] >= enough]

    def _cutting_for_something(self) -> list[int]:
        """Buckets, but for those cut to which the first request, alone on all lanes, is done no sooner than whole."""
        _, history, rows = self._backlog.items[0]
        whole, _ = cheapest(self.prices(1), history + rows, rows)
        free, busy, caps = self._lanes.free, self._lanes.busy + 1, list[int]()
        for cap, bucket in enumerate(self._ladder):
            room = min(bucket.candidates, bucket.tokens - history)
            cut = 0 < room < rows
            if not cut or -(-rows // (room * free)) * self._costs.seconds(bucket, busy) < whole:
                caps.append(cap)
        return caps

    def _rate(self, loads: list[Load]) -> float:
        """Useful rows per second of a lane."""
        prices = self.prices(self._lanes.free)
        seconds = [cheapest(prices, load.tokens, load.candidates)[0] for load in loads]
        return sum([load.work for load in loads]) / sum(seconds)

    def _play(self, now: list[Load], later: list[Load], behind: list[Item]) -> Plan:
        """Run batches on as many lanes as are launched now, each on the one that is free first."""
        due, earliest, width = self._backlog.due, self._earliest, len(now)
        prices, free = self.prices(width), [self._lanes.start] * width
        launch: list[tuple[Load, Bucket]] = []
        late, included, total, split, spent = 0, 0, 0.0, 0.0, 0.0
        for load in now + later:
            seconds, bucket = cheapest(prices, load.tokens, load.candidates)
            if len(launch) < width:
                launch.append((load, bucket))
            else:
                spent += seconds
            lane = free.index(min(free)) if width > 1 else 0
            end = free[lane] = free[lane] + seconds
            total += end * len(load.joined)
            # A request's pieces follow each other; it is done when the last of them ends.
            split = max(split, end)
            if load.whole:
                total += split
                late += due[load.head] < split
                split = 0.0
            if end > earliest:
                late += sum([due[position] < end for position in load.joined])
            if not spent:
                included = late
        first = min(free)
        if behind:
            # What is left flows at the rate of what was laid out for later.
            work = self._backlog.work
            pace = spent / width / sum([load.work for load in later])
            mean = sum(free) / width
            first = mean + pace * sum([work[item[0]] for item in behind])
            total += len(behind) * (mean + first) / 2
            if first > earliest:
                step = (first - mean) / len(behind)
                late += sum([due[item[0]] < mean + n * step for n, item in enumerate(behind, 1)])
        if width == self._lanes.free:
            # Who comes while no lane is free waits half of that time, less if another lane is free before.
            total += self._lanes.arrivals * first * first / (2 + 2 * self._lanes.busy)
        return Plan(late, included, total, launch, bool(later))


def cheapest(prices: Prices, tokens: int, candidates: int) -> tuple[float, Bucket]:
    """Seconds and bucket of the cheapest that holds so many rows; infinite if none does."""
    for price in prices:
        if price[1][0] >= tokens and price[1][1] >= candidates:
            return price
    return math.inf, prices[-1][1]


def _rank(plan: Plan) -> tuple[int, int, float]:
    # Of two that are late behind the launch, one may be dropped and the other be in time after all.
    return plan.late, plan.included, plan.cost
