"""Training and test examples from a store: one history, many candidates (SUMI), split by time for every user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flame_jax.packing import Bucket, Extent, Layout, SlotLayout, fits, place, slot_layout
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.records import UserRecord
from flame_jax.pda.store import Fetched
from flame_jax.request import History, RankRequest
from flame_jax.schema import FeatureSchema
from flame_jax.vocabulary import Vocabulary


class Example(NamedTuple):
    """Score events [start, stop) of a user from the history before them."""

    user: int
    start: int
    stop: int


class Batch(NamedTuple):
    """One packed training batch.

    Attributes:
        words: int32[slot words].
        labels: float32[C_max, tasks].
        mask: float32[C_max], 1 on candidate rows.
        examples: the examples in it and their first candidate row.
    """

    words: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    examples: list[tuple[Example, int]]


class Dataset:
    """Every user's events and features, read from a store once."""

    def __init__(self, store: LmdbStore, schema: FeatureSchema) -> None:
        self.schema = schema
        self.users: list[tuple[str, UserRecord]] = []
        none = np.empty(0, np.int64)
        for key in store.users():
            record = store.read(key, none).user
            assert record is not None, "a listed user is in the store"
            self.users.append((key, record))
        self._ids = np.unique(np.concatenate([none, *(record.history.item_ids for _, record in self.users)]))
        self._items = store.read(None, self._ids)

    def lengths(self) -> np.ndarray:
        """int64[users], events per user."""
        return np.array([len(record.history) for _, record in self.users], np.int64)

    def request(self, example: Example) -> tuple[RankRequest, Fetched]:
        """The request that scores an example as of its first candidate's time."""
        key, record = self.users[example.user]
        past, future = slice(0, example.start), slice(example.start, example.stop)
        history = record.history
        candidates = history.item_ids[future]
        at = np.searchsorted(self._ids, candidates)
        request = RankRequest(
            user=key,
            candidates=candidates,
            scenario=0,
            request_time=int(history.timestamps[example.start]),
            history=History(history.item_ids[past], history.actions[past], history.timestamps[past]),
        )
        return request, Fetched(record, self._items.items[at], self._items.found[at])

    def labels(self, example: Example, label_actions: Mapping[str, Sequence[int]]) -> np.ndarray:
        """float32[candidates, tasks]."""
        actions = self.users[example.user][1].history.actions[example.start : example.stop]
        return np.stack([np.isin(actions, label_actions[task]) for task in self.schema.tasks], 1).astype(np.float32)


def split_points(lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Events each user keeps for training when the newest `fraction` (rounded down) is held out."""
    return lengths - np.floor(lengths * fraction).astype(np.int64)


def sample_examples(stops: np.ndarray, *, chunk: int, min_history: int, random: np.random.Generator) -> list[Example]:
    """Cut every user's events [min_history, stop) at random into chunks of chunk/4 to chunk candidates.

    Each event is a candidate once; users come in random order.
    """
    examples = []
    for user in random.permutation(len(stops)):
        at, stop = min(min_history, int(stops[user]) - 1), int(stops[user])
        at = max(at, 0)
        while at < stop:
            end = min(stop, at + int(random.integers(max(1, chunk // 4), chunk + 1)))
            examples.append(Example(int(user), at, end))
            at = end
    random.shuffle(examples)
    return examples


class Packer:
    """Packs examples into slots of one bucket, through the same assembler and layout as the server."""

    def __init__(
        self,
        dataset: Dataset,
        vocabulary: Vocabulary,
        layout: Layout,
        bucket: Bucket,
        label_actions: Mapping[str, Sequence[int]],
    ) -> None:
        self._dataset, self._layout, self._bucket = dataset, layout, bucket
        self._label_actions = label_actions
        self._assembler = Assembler(dataset.schema, vocabulary)
        self.slot: SlotLayout = slot_layout(dataset.schema, layout, bucket)

    def batches(self, examples: Iterable[Example]) -> Iterator[Batch]:
        """Fill slots in order. Raises ValueError for an example that no empty slot holds."""
        held: list[tuple[Example, np.ndarray]] = []
        extents: list[Extent] = []
        for example in examples:
            record = self._assembler.assemble(*self._dataset.request(example)).record
            extent = self._assembler.layout.extent(record)
            if held and not fits([*extents, extent], self._bucket, self._layout):
                yield self._pack(held, extents)
                held, extents = [], []
            held.append((example, record))
            extents.append(extent)
        if held:
            yield self._pack(held, extents)

    def _pack(self, held: list[tuple[Example, np.ndarray]], extents: list[Extent]) -> Batch:
        words = np.zeros(self.slot.words, np.int32)
        fields = self.slot.views(words)
        labels = np.zeros((self._bucket.candidates, len(self._dataset.schema.tasks)), np.float32)
        mask = np.zeros(self._bucket.candidates, np.float32)
        placed = []
        for row, ((example, record), where) in enumerate(
            zip(held, place(extents, self._bucket, self._layout), strict=True)
        ):
            count = example.stop - example.start
            self._assembler.layout.write(fields, row, where, record, 0, count)
            first = where.candidate_start - (self._bucket.tokens - self._bucket.candidates)
            labels[first : first + count] = self._dataset.labels(example, self._label_actions)
            mask[first : first + count] = 1.0
            placed.append((example, first))
        return Batch(words, labels, mask, placed)
