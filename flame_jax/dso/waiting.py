"""The queue: requests by deadline and by traffic class, how many may wait, and who must go."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from heapq import merge
from itertools import islice

from flame_jax.dso.work import Work

_Entry = tuple[float, int, Work]
"""When it is due, its ticket, and the request: tuples are compared without a call into Python."""

INTERVAL = 0.1
"""Seconds over which a queue that never becomes short counts as standing (CoDel's interval)."""
GROWTH = 1.25
"""How many times as many may wait after an interval in which the queue was short."""
HOLD = 0.5
"""Seconds for which an overload counts as one after its last such interval."""


class Queue:
    """Requests that wait, in lists of their class by deadline.

    Two orders: by deadline over all classes; or, under overload, so that classes get their shares of the devices
    (by virtual time, as in fair queueing), by deadline within a class.

    Args:
        shares: of each class, positive; their scale does not matter.

    Attributes:
        rows: of all that wait.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        total = sum(shares)
        self.shares = [share / total for share in shares]
        self._classes: list[list[_Entry]] = [[] for _ in shares]
        self._rows = [0] * len(shares)
        self.rows = 0
        self._virtual = [0.0] * len(shares)
        self._clock = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, work: Work) -> None:
        """Let it wait, or more of it."""
        number = work.traffic_class
        if work.queued:
            self._count_rows(work)
            return
        if not self._classes[number]:  # a class that was away has saved nothing up, and owes nothing
            self._virtual[number] = max(self._virtual[number], self._clock)
        insort(self._classes[number], (work.due, work.ticket, work))
        work.queued = True
        self._count += 1
        self._count_rows(work)

    def _count_rows(self, work: Work) -> None:
        """What is left of it may have changed."""
        change = work.rows_left - work.rows_counted if work.queued else -work.rows_counted
        work.rows_counted += change
        self._rows[work.traffic_class] += change
        self.rows += change

    def remove(self, work: Work) -> None:
        """Take out one that waits."""
        entries = self._classes[work.traffic_class]
        del entries[bisect_left(entries, (work.due, work.ticket))]
        work.queued = False
        self._count -= 1
        self._count_rows(work)

    def served(self, work: Work, part: float) -> None:
        """This part of it goes to a device: its class has had that, and less of it waits, or nothing."""
        number = work.traffic_class
        self._clock = max(self._clock, self._virtual[number])
        self._virtual[number] += part * work.rows / self.shares[number]
        if not work.queued:
            return
        if work.todo:
            self._count_rows(work)
        else:
            self.remove(work)

    def front(self, count: int, *, by_share: bool) -> list[Work]:
        """The first `count`, the most urgent first."""
        filled = [number for number, works in enumerate(self._classes) if works]
        if len(filled) == 1:
            entries = self._classes[filled[0]][:count]
        elif not by_share:
            entries = list(islice(merge(*self._classes), count))
        else:
            return self._by_share(count, filled)
        return [work for _, _, work in entries]

    def _by_share(self, count: int, filled: list[int]) -> list[Work]:
        virtual, at, found = list(self._virtual), [0] * len(self._classes), list[Work]()
        while filled and len(found) < count:
            number = min(filled, key=virtual.__getitem__)
            work = self._classes[number][at[number]][2]
            found.append(work)
            virtual[number] += work.rows / self.shares[number]
            at[number] += 1
            if at[number] == len(self._classes[number]):
                filled.remove(number)
        return found

    def due_by(self, time: float) -> list[Work]:
        """Take out and return all that are due by then."""
        found = [work for entries in self._classes for _, _, work in entries[: bisect_right(entries, (time, math.inf))]]
        for work in found:
            self.remove(work)
        return found

    def firsts(self) -> list[Work]:
        """The most urgent of each class."""
        return [entries[0][2] for entries in self._classes if entries]

    def rows_before(self, due: float, traffic_class: int, *, by_share: bool) -> float:
        """About how many rows go to the devices before a request of this class that is due then."""
        if not by_share:
            return sum(self._before(number, due) for number in range(len(self._classes)))
        waiting = [n for n, works in enumerate(self._classes) if works or n == traffic_class]
        part = self.shares[traffic_class] / sum(self.shares[n] for n in waiting)
        return min(self._before(traffic_class, due) / part, float(self.rows))

    def _before(self, number: int, due: float) -> float:
        entries = self._classes[number]
        if not entries or entries[-1][0] <= due:
            return float(self._rows[number])
        return self._rows[number] * bisect_right(entries, (due, math.inf)) / len(entries)

    def most_over(self, traffic_class: int, limit: int) -> Work | None:
        """Whoever makes room for one more of this class: the least urgent of the class that is the most over its share
        of `limit`; None where this class is over its own."""
        if len(self._classes[traffic_class]) + 1 > self.shares[traffic_class] * limit:
            return None
        over = [len(works) - share * limit for works, share in zip(self._classes, self.shares, strict=True)]
        most = max(range(len(over)), key=over.__getitem__)
        return self._classes[most][-1][2] if over[most] > 0 else None


class QueueLimit:
    """How many may wait: fewer while there are always more than the devices get through in `target` seconds.

    After CoDel (Nichols and Jacobson, 2012): what counts is the least backlog of an interval, so that a burst is none.

    Args:
        floor: as many may wait in any case.
        most: and never more than so many.

    Attributes:
        limit: requests that may wait.
        overloaded: there was a standing queue within the last `HOLD` seconds.
    """

    def __init__(self, *, target: float, floor: int, most: int) -> None:
        self._target, self._floor, self._most = target, min(floor, most), most
        self.limit, self.overloaded = most, False
        self._until = self._least = self._hold = 0.0
        self._launched = 0

    def observe(self, now: float, backlog: float, launched: int) -> None:
        """Some requests were launched, and what still waits takes `backlog` seconds."""
        self._least, self._launched = min(self._least, backlog), self._launched + launched
        if now < self._until:
            return
        passed = now - self._until + INTERVAL
        if self._least > self._target:
            self.overloaded, self._hold = True, now + HOLD
            self.limit = min(self._most, max(self._floor, int(self._launched / passed * self._target)))
        else:
            self.overloaded = now < self._hold
            self.limit = int(min(self._most, self.limit * GROWTH ** min(100.0, passed / INTERVAL) + 1))
        self._until, self._least, self._launched = now + INTERVAL, backlog, 0
