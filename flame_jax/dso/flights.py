"""Batches on their way, and what each lane does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from flame_jax.dso.work import Part
from flame_jax.packing import Bucket


@dataclass
class Totals:
    """What has run so far.

    Attributes:
        batches: that ended.
        rows: of requests in them.
        tokens: of their buckets.
        busy_seconds: for which lanes had a batch, summed over lanes.
    """

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0


@dataclass(eq=False)
class Flight:
    """A batch on its way.

    Attributes:
        lane: number of the lane it runs on.
        busy: lanes that ran something when it was launched, its own among them.
        queued: requests still waited when it was launched.
        decided: when it was, in seconds.
        launched: when it went to its lane, filled; before, as `decided`.
        rows: of its requests.
        useful: of these, a history of which only some candidates are in counts in proportion.
        again: it is of one request that was in a batch that failed.
    """

    lane: int
    bucket: Bucket
    parts: list[Part]
    busy: int
    queued: bool
    decided: float
    launched: float
    rows: int
    useful: float
    again: bool


@dataclass(eq=False)
class LaneState:
    """What one lane does.

    Attributes:
        flights: launched on it and not finished, in order.
        free_at: when the last of them is expected to end.
        finished: when the last batch ended.
        failures: batches that failed in a row, of other requests each.
        blamed: requests that were in them.
    """

    flights: deque[Flight] = field(default_factory=deque)
    free_at: float = 0.0
    finished: float = 0.0
    failures: int = 0
    blamed: set[int] = field(default_factory=set)
    alive: bool = True
