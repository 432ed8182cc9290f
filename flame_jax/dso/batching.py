"""Which waiting requests go into the next batch, and in which bucket. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


Item = tuple[int, int, int]
"""A waiting request: its position, and its aligned rows of history and of candidates."""


class Room(NamedTuple):
    """What a batch has left, in rows and in requests; `tokens` are those of histories and candidates together."""

    tokens: int
    candidates: int
    requests: int


def join(items: Iterable[Item], room: Room, least: Room = Room(1, 1, 1)) -> tuple[list[int], Room]:  # noqa: B008
    """Fill what room a batch has, in order, with those that fit whole.

    Args:
        least: what every item takes at least.

    Returns:
        Positions of those that joined, and the room that is left.
    """
    tokens, candidates, requests = room
    least_tokens, least_candidates, _ = least
    joined = []
    for position, history, rows in items:
        if tokens < least_tokens or candidates < least_candidates or not requests:
            break
        if rows <= candidates and history + rows <= tokens:
            joined.append(position)
            tokens -= history + rows
            candidates -= rows
            requests -= 1
    return joined, Room(tokens, candidates, requests)


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
        raise no_room(first.history, largest)
    history, candidates = layout.aligned_extent(Extent(first.history, taken))
    room = Room(largest.tokens - history - candidates, largest.candidates - candidates, layout.max_requests - 1)
    joined, room = join(
        ((position, *layout.aligned_extent(waiting[position])) for position in range(1, min(len(waiting), SCAN))),
        room,
    )
    tokens, candidates = largest.tokens - room.tokens, largest.candidates - room.candidates
    bucket = next(b for b in ladder if candidates <= b.candidates and tokens <= b.tokens)
    return Batch(bucket, (Share(0, taken), *(Share(position, waiting[position].candidates) for position in joined)))


def no_room(history: int, largest: Bucket) -> ValueError:
    """What is raised for a request whose history leaves no room for a candidate in any bucket."""
    return ValueError(f"a history of {history} rows leaves no room for candidates in {largest}")
