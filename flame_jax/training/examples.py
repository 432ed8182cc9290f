"""Training and test examples from a store: one history, many candidates (SUMI), split by time for every user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flame_jax.packing import Bucket, Extent, Layout, SlotLayout, fits, place, slot_layout
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.records import UserRecord
from flame_jax.pda.store import Fetched
from flame_jax.request import History, RankRequest
from flame_jax.schema import FeatureSchema
from flame_jax.training.negatives import NO_ITEM
from flame_jax.vocabulary import Vocabularies

Negatives = Sequence[np.ndarray]
"""Per user int64[events, k]: sampled items beside each event, see `NegativeSampler.draw`."""


class Example(NamedTuple):
    """Score events [start, stop) of a user, and the negatives beside them, as of event `seen`: from those before it.

    Events of one time came together: `seen` is the first of the time of `start`, or an earlier event.
    """

    user: int
    seen: int
    start: int
    stop: int


class Candidates(NamedTuple):
    """What an example scores: int64[C] item ids and float32[C, tasks] labels.

    Each event is followed by its negatives, whose labels are 0.
    """

    items: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """One packed training batch.

    Attributes:
        words: int32[slot words].
        labels: float32[C_max, tasks].
        mask: float32[C_max], 1 on candidate rows.
        examples: the examples in it, their first candidate row and their number of candidates.
    """

    words: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    examples: list[tuple[Example, int, int]]


class Dataset:
    """Every user's events and features, read from a store once.

    Args:
        label_actions: per task, the actions that count as positive.
    """

    def __init__(self, store: LmdbStore, schema: FeatureSchema, label_actions: Mapping[str, Sequence[int]]) -> None:
        self.schema = schema
        self._label_of = np.stack(
            [np.isin(np.arange(schema.actions), label_actions[task]) for task in schema.tasks], axis=1
        ).astype(np.float32)
        self.users: list[tuple[str, UserRecord]] = []
        none = np.empty(0, np.int64)
        for key in store.users():
            record = store.read(key, none).user
            assert record is not None, "a listed user is in the store"
            self.users.append((key, record))
        self._ids = store.item_ids()
        self._items = store.read(None, self._ids)
        # Items without a record have the default features, which a store's reader fills in.
        self._absent = store.read(None, np.array([np.iinfo(np.int64).max]))

    def histories(self) -> list[History]:
        """Every user's events."""
        return [record.history for _, record in self.users]

    def moments(self) -> list[np.ndarray]:
        """Per user int64[events]: the first event of each event's time."""
        return [np.searchsorted(h.timestamps, h.timestamps, side="left") for h in self.histories()]

    def lengths(self) -> np.ndarray:
        """int64[users], events per user."""
        return np.array([len(record.history) for _, record in self.users], np.int64)

    def block_lengths(self) -> list[np.ndarray]:
        """Per user int64[events + 1]: events of the longest block when that many events have been seen."""
        lengths = []
        for history in self.histories():
            longest = np.zeros(len(history) + 1, np.int64)
            for block in self.schema.blocks:
                mine = np.isin(history.actions, block.actions or range(self.schema.actions))
                np.maximum(longest[1:], np.cumsum(mine), out=longest[1:])
            lengths.append(np.minimum(longest, self.schema.block_length))
        return lengths

    def items(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored rows of int64[n] items, with default features where the store has none, and bool[n] whether it has."""
        at = np.minimum(np.searchsorted(self._ids, ids), max(len(self._ids) - 1, 0))
        if not len(self._ids):
            rows, found = np.repeat(self._absent.items, len(ids)), np.zeros(len(ids), bool)
        else:
            found = self._ids[at] == ids
            rows = np.where(found, self._items.items[at], self._absent.items)
        rows["id"] = ids
        return rows, found

    def candidates(self, user: int, start: int, stop: int, negatives: Negatives | None) -> Candidates:
        """Events [start, stop) of a user and the negatives beside them."""
        history = self.users[user][1].history
        items = history.item_ids[start:stop, None]
        labels = self._label_of[history.actions[start:stop]]
        if negatives is None:
            return Candidates(items[:, 0], labels)
        items = np.concatenate([items, negatives[user][start:stop]], axis=1)
        spread = np.zeros((*items.shape, labels.shape[1]), np.float32)
        spread[:, 0] = labels
        real = items != NO_ITEM
        return Candidates(items[real], spread[real])

    def request(self, example: Example, candidates: np.ndarray) -> tuple[RankRequest, Fetched]:
        """The request that scores int64[C] candidates as of an example's time."""
        key, record = self.users[example.user]
        history, past = record.history, slice(0, example.seen)
        request = RankRequest(
            user=key,
            candidates=candidates,
            scenario=0,
            request_time=int(history.timestamps[example.seen]),
            history=History(history.item_ids[past], history.actions[past], history.timestamps[past]),
        )
        return request, Fetched(record, *self.items(candidates))


def split_points(lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Events each user keeps for training when the newest `fraction` (rounded down) is held out."""
    return lengths - np.floor(lengths * fraction).astype(np.int64)


def sample_examples(
    stops: np.ndarray, moments: Sequence[np.ndarray], *, chunk: int, min_history: int, random: np.random.Generator
) -> list[Example]:
    """Cut every user's events [min_history, stop) at random into chunks of chunk/4 to chunk events.

    Each event is a candidate once; users come in random order.

    Args:
        moments: see `Dataset.moments`.
    """
    examples = []
    for user in random.permutation(len(stops)):
        at, stop = min(min_history, int(stops[user]) - 1), int(stops[user])
        at = max(at, 0)
        while at < stop:
            end = min(stop, at + int(random.integers(max(1, chunk // 4), chunk + 1)))
            examples.append(Example(int(user), int(moments[user][at]), at, end))
            at = end
    random.shuffle(examples)
    return examples


def held_out_examples(
    starts: np.ndarray, stops: np.ndarray, moments: Sequence[np.ndarray], *, most: int
) -> list[Example]:
    """Events [start, stop) of every user as of the time of `start`, in order, in pieces of at most `most` events."""
    return [
        Example(user, int(moments[user][start]), at, min(at + most, stop))
        for user, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))
        for at in range(start, stop, most)
    ]


class Packer:
    """Packs examples into slots of one bucket, through the same assembler and layout as the server."""

    def __init__(self, dataset: Dataset, vocabularies: Vocabularies, layout: Layout, bucket: Bucket) -> None:
        self._dataset, self._layout, self._bucket = dataset, layout, bucket
        self._assembler = Assembler(dataset.schema, vocabularies)
        self.moments = dataset.moments()
        self._block_lengths = dataset.block_lengths()
        self.slot: SlotLayout = slot_layout(dataset.schema, layout, bucket)

    def groups(self, examples: Iterable[Example], negatives: Negatives | None = None) -> list[list[Example]]:
        """Which examples share a slot, in order; counts rows and assembles nothing."""
        groups: list[list[Example]] = []
        extents: list[Extent] = []
        for example in examples:
            extent = self._extent(example, negatives)
            if not extents or not fits([*extents, extent], self._bucket, self._layout):
                groups.append([])
                extents = []
            groups[-1].append(example)
            extents.append(extent)
        return groups

    def _extent(self, example: Example, negatives: Negatives | None) -> Extent:
        candidates = example.stop - example.start
        if negatives is not None:
            candidates += int(np.count_nonzero(negatives[example.user][example.start : example.stop] != NO_ITEM))
        history = int(self._block_lengths[example.user][example.seen])
        return Extent(history * (2 if self._dataset.schema.interleave else 1), candidates)

    def pack(self, group: Sequence[Example], negatives: Negatives | None = None) -> Batch:
        """Fill a slot with one of `groups`. Raises ValueError for an example that no empty slot holds."""
        words = np.zeros(self.slot.words, np.int32)
        fields = self.slot.views(words)
        labels = np.zeros((self._bucket.candidates, len(self._dataset.schema.tasks)), np.float32)
        mask = np.zeros(self._bucket.candidates, np.float32)
        placed = []
        places = place([self._extent(example, negatives) for example in group], self._bucket, self._layout)
        for row, (example, where) in enumerate(zip(group, places, strict=True)):
            candidates = self._dataset.candidates(example.user, example.start, example.stop, negatives)
            record = self._assembler.assemble(*self._dataset.request(example, candidates.items)).record
            count = len(candidates.items)
            self._assembler.layout.write(fields, row, where, record, 0, count)
            first = where.candidate_start - (self._bucket.tokens - self._bucket.candidates)
            labels[first : first + count] = candidates.labels
            mask[first : first + count] = 1.0
            placed.append((example, first, count))
        return Batch(words, labels, mask, placed)
