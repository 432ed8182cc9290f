"""What waits, laid out as batches before they have buckets. Plain integers: a policy tries many layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flame_jax.dso.batching import Batch, Item, Room, Share, join, no_room
from flame_jax.dso.policy import Waiting
from flame_jax.fke.buckets import Ladder
from flame_jax.packing import Bucket, Extent, Layout


class Load(NamedTuple):
    """What one batch holds, in aligned rows.

    Attributes:
        head: position of its most urgent request, the only one that may be taken in part.
        rows: candidate rows it takes of the head.
        whole: nothing of the head is left.
        joined: positions of the others.
        tokens: rows of all.
        candidates: candidate rows of all.
        work: useful rows: of a request in pieces, those of its history in proportion to its candidates.
    """

    head: int
    rows: int
    whole: bool
    joined: list[int]
    tokens: int
    candidates: int
    work: float

    @property
    def requests(self) -> int:
        """How many share the batch."""
        return 1 + len(self.joined)


class Backlog:
    """Waiting requests in aligned rows.

    Attributes:
        items: in the order in which they are served, those that some bucket has room for.
        due: by position, seconds from now.
        work: by position, rows of a history and candidates.
        tokens: rows of all items.

    Raises:
        ValueError: the first request's history leaves no room for a candidate in any bucket.
    """

    def __init__(self, waiting: Sequence[Waiting], now: float, ladder: Ladder, layout: Layout) -> None:
        self._waiting, self._ladder, self._layout = waiting, ladder, layout
        self._alone = {position for position, request in enumerate(waiting) if request.alone}
        up, down, room = layout.align - 1, -layout.align, ladder[-1].tokens
        extents = [request.extent for request in waiting]
        self._rows = [(candidates + up) & down for _, candidates in extents]
        self.due = [request.due - now for request in waiting]
        self.work = [history + candidates for history, candidates in extents]
        self.items: list[Item] = [
            (position, (history + up) & down, self._rows[position])
            for position, (history, _) in enumerate(extents)
            if (history + up) & down < room
        ]
        if not self.items or self.items[0][0]:
            raise no_room(extents[0].history, ladder[-1])
        self.tokens = sum([history + rows for _, history, rows in self.items])
        self._least = Room(min([history + rows for _, history, rows in self.items]), min(self._rows), 1)

    @property
    def holds_all(self) -> bool:
        """Whether the largest bucket holds each of them whole."""
        tokens, candidates = self._ladder[-1]
        return max([rows for _, _, rows in self.items]) <= candidates and (
            max([history + rows for _, history, rows in self.items]) <= tokens
        )

    @property
    def mean(self) -> Extent:
        """Aligned rows of a request like those that wait."""
        count, layout = len(self.items), self._layout
        history = sum(history for _, history, _ in self.items) // count
        return layout.aligned_extent(Extent(history, sum(rows for _, _, rows in self.items) // count))

    def pack(self, items: list[Item], cap: int, most: int) -> tuple[list[Load], list[Item]]:
        """Fill batches one after the other, each greedily and in order.

        Args:
            cap: which bucket of the ladder no batch exceeds; a history that it has no room for takes the next.
            most: batches.

        Returns:
            The loads, and what is left.
        """
        loads: list[Load] = []
        alone, requests = self._alone, self._layout.max_requests - 1
        while items and len(loads) < most:
            head, history, rows = items[0]
            rest = items[1:]
            tokens, candidates = self._ladder[cap]
            if tokens <= history:
                tokens, candidates = next(bucket for bucket in self._ladder[cap:] if bucket.tokens > history)
            taken = min(rows, candidates, tokens - history)
            room = Room(tokens - history - taken, candidates - taken, requests)
            joined: list[int] = []
            if rest and head not in alone:
                joined, room = join([i for i in rest if i[0] not in alone] if alone else rest, room, self._least)
            tokens, candidates = tokens - room.tokens, candidates - room.candidates
            useful = self.work[head] * taken / self._rows[head]
            if joined:
                useful += sum([self.work[position] for position in joined])
                gone = set(joined)
                rest = [item for item in rest if item[0] not in gone]
            loads.append(Load(head, taken, taken == rows, joined, tokens, candidates, useful))
            items = rest if taken == rows else [(head, history, rows - taken), *rest]
        return loads, items

    def spread(self, count: int) -> list[Load] | None:
        """Every request whole in one of `count` batches of about equal rows; None if they don't fit so."""
        if self._alone and count < len(self.items):
            return None
        groups: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for index, (_, history, rows) in sorted(enumerate(self.items), key=lambda pair: -pair[1][1] - pair[1][2]):
            least = tokens.index(min(tokens))
            groups[least].append(index)
            tokens[least] += history + rows
        loads = []
        for group in sorted(sorted(group) for group in groups):
            (head, _, rows), *others = [self.items[index] for index in group]
            candidates = rows + sum(item[2] for item in others)
            used = candidates + sum(self.items[index][1] for index in group)
            if not self._fits(used, candidates, len(group)):
                return None
            joined = [item[0] for item in others]
            useful = self.work[head] + sum(self.work[position] for position in joined)
            loads.append(Load(head, rows, True, joined, used, candidates, useful))
        return loads

    def _fits(self, tokens: int, candidates: int, requests: int) -> bool:
        largest = self._ladder[-1]
        return tokens <= largest.tokens and candidates <= largest.candidates and requests <= self._layout.max_requests

    def batches(self, loads: Sequence[tuple[Load, Bucket]]) -> tuple[Batch, ...]:
        """Batches of one launch, in its order."""
        batches = []
        served: dict[int, int] = {}
        for load, bucket in loads:
            before = served.get(load.head, 0)
            left = self._waiting[load.head].extent.candidates - before
            taken = left if load.whole else load.rows
            served[load.head] = before + taken
            others = (Share(position, self._waiting[position].extent.candidates) for position in load.joined)
            batches.append(Batch(bucket, (Share(load.head, taken), *others)))
        return tuple(batches)
