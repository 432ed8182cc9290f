"""Which waiting requests go into the next batch, and in which bucket. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flame_jax.fke.buckets import Ladder, capacity
from flame_jax.packing import Bucket, Extent, Layout

SCAN = 256
"""Waiting requests looked at for one batch at most."""


class Share(NamedTuple):
    """How many candidates of one waiting request the batch takes, from its first unserved one on."""

    position: int
    candidates: int


class Batch(NamedTuple):
    """One slot's worth of work."""

    bucket: Bucket
    shares: tuple[Share, ...]


def next_batch(waiting: Sequence[Extent], ladder: Ladder, layout: Layout) -> Batch:
    """Choose the next batch.

    The first waiting request always goes, whole if the largest bucket holds it, else with as many candidates
    as fit (so a large request leaves in pieces, the largest first, its history repeated for each). Others
    join, in order, when they fit whole. The batch takes the cheapest bucket that holds it.

    Args:
        waiting: what is still to be scored of each request, most urgent first; not empty.

    Raises:
        ValueError: the first request's history leaves no room for a candidate in any bucket.
    """
    largest = ladder[-1]
    first = waiting[0]
    taken = min(first.candidates, capacity(largest, first.history, layout))
    if taken <= 0:
        raise ValueError(f"a history of {first.history} rows leaves no room for candidates in {largest}")
    shares = [Share(0, taken)]
    total = layout.aligned_extent(Extent(first.history, taken))
    for position, extent in enumerate(waiting[1:SCAN], start=1):
        if len(shares) == layout.max_requests or total.candidates == largest.candidates:
            break
        history, candidates = layout.aligned_extent(extent)
        grown = Extent(total.history + history, total.candidates + candidates)
        if grown.candidates <= largest.candidates and sum(grown) <= largest.tokens:
            shares.append(Share(position, extent.candidates))
            total = grown
    bucket = next(b for b in ladder if total.candidates <= b.candidates and sum(total) <= b.tokens)
    return Batch(bucket, tuple(shares))
