"""A golden set: requests and the scores they must get, made with the artifact and replayed whenever it is loaded.

Requests are random records, drawn from what the schema and the vocabularies allow, so that a set needs no user's data.
The scores come from the model's reference implementation, compiled for the CPU, whatever the artifact's executables
run on. So a set tells a wrong kernel, compilation, layout or weight; ids and vocabularies it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flame_jax.config import ModelConfig
from flame_jax.fke.buckets import Ladder
from flame_jax.host_table import places_of
from flame_jax.models.serving import hot_rows, served_slot
from flame_jax.packing import Bucket, Extent, Layout, fits
from flame_jax.record import BlockEvents, Piece, RecordLayout
from flame_jax.schema import Feature, FeatureSchema, feature_field
from flame_jax.vocabulary import Vocabularies

MAX_CANDIDATES = 128
"""Of one golden request, or a tile of them: enough to fill several tiles, few enough to score on the CPU."""

Run = Callable[[np.ndarray], np.ndarray]
"""A slot's words int32[words] to scores float32[C_max, tasks]."""


@dataclass(frozen=True)
class Golden:
    """Requests and their scores.

    Attributes:
        records: see `flame_jax.record`.
        scores: float32[candidates, tasks] each, probabilities.
    """

    records: list[np.ndarray]
    scores: list[np.ndarray]

    @cached_property
    def spread(self) -> float:
        """Unit of `apart`: how far the logits spread, or what rounding may do to them where they hardly do."""
        every = np.concatenate([_logits(scores).ravel() for scores in self.scores])
        return max(float(every.std()), 0.05 * float(np.sqrt(np.mean(every**2))), 0.01)

    def apart(self, scores: np.ndarray, others: np.ndarray) -> float:
        """Largest difference of two sets of probabilities, as logits, in units of `spread`.

        As logits, because a click model's probabilities may all lie below any tolerance. Infinite where a score is
        no number, or there are not as many.
        """
        if scores.shape != others.shape or not (np.isfinite(scores).all() and np.isfinite(others).all()):
            return float("inf")
        return float(np.abs(_logits(scores) - _logits(others)).max(initial=0.0)) / self.spread

    def tensors(self) -> dict[str, np.ndarray]:
        """As named arrays."""
        return {f"record.{i}": r for i, r in enumerate(self.records)} | {
            f"scores.{i}": s for i, s in enumerate(self.scores)
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], records: RecordLayout, tasks: int) -> Golden:
        """Inverse of `tensors`. Raises ValueError for a set that is empty or malformed."""
        count = len(tensors) // 2
        try:
            golden = cls([tensors[f"record.{i}"] for i in range(count)], [tensors[f"scores.{i}"] for i in range(count)])
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None
        if not count or len(tensors) != 2 * count:
            raise ValueError("it holds no pairs of records and scores")
        for record, scores in zip(golden.records, golden.scores, strict=True):
            if record.dtype != np.int32 or record.ndim != 1 or not records.is_whole(record):
                raise ValueError("one of its records is not one of this schema")
            if scores.shape != (records.extent(record).candidates, tasks):
                raise ValueError("one of its scores does not fit its record")
        golden.check()
        return golden

    def check(self) -> None:
        """Raise ValueError where a score is no probability."""
        if not all(np.isfinite(s).all() and (s >= 0).all() and (s <= 1).all() for s in self.scores):
            raise ValueError("the model's scores of random requests are no probabilities")


def _logits(probabilities: np.ndarray) -> np.ndarray:
    p = np.clip(probabilities.astype(np.float64), 1e-30, 1 - 2.0**-24)
    return np.asarray(np.log(p) - np.log1p(-p))


def golden_records(
    schema: FeatureSchema, vocabularies: Vocabularies, layout: Layout, ladder: Ladder, seed: int = 0
) -> list[np.ndarray]:
    """Random requests: one that fills each bucket as far as one can, one of a third of it, and one without history.

    A third, so that one finds room beside others and at several places.
    """
    random, records = np.random.default_rng(seed), RecordLayout(schema)
    extents = {Extent(0, min(layout.align, ladder[0].candidates))}
    for bucket in ladder:
        for share in (1, 3):
            candidates = max(1, min(MAX_CANDIDATES, bucket.candidates // share))
            room = (bucket.tokens - layout.aligned(candidates)) // share // layout.align * layout.align
            extents.add(Extent(min(schema.history_rows, room), candidates))
    return [_record(schema, vocabularies, records, extent, random) for extent in sorted(extents)]


def _record(
    schema: FeatureSchema,
    vocabularies: Vocabularies,
    records: RecordLayout,
    extent: Extent,
    random: np.random.Generator,
) -> np.ndarray:
    events = extent.history // (2 if schema.interleave else 1)
    now = 1_700_000_000
    # The first block is as long as the extent says, the others have what they have.
    lengths = [events, *random.integers(events // 2, events + 1, len(schema.blocks) - 1).tolist()]

    def items(count: int) -> np.ndarray:
        return random.integers(0, vocabularies.items.rows, count).astype(np.int32)

    def actions(allowed: Sequence[int], count: int) -> np.ndarray:
        return random.choice(np.array(allowed or range(schema.actions), np.int32), count)

    def times(count: int) -> np.ndarray:
        ago = np.sort(np.exp(random.uniform(0, np.log(3e7), count)))[::-1]  # from a second to a year
        return (now - ago).astype(np.int32)

    def words(group: str, feature: Feature, count: int) -> np.ndarray:
        if feature.kind == "numeric":
            return random.normal(size=count).astype(np.float32).view(np.int32)
        name = feature_field(group, feature)
        limit = vocabularies.features[name].rows if feature.kind == "id" else feature.limit
        return random.integers(0, limit, count).astype(np.int32)

    travelling = schema.slot_features
    return records.encode(
        scenario=int(random.integers(len(schema.scenarios))),
        request_time=now,
        request_words=np.array([words(g, f, 1)[0] for g, f in travelling if g != "item"], np.int32),
        blocks=[
            BlockEvents(items(n), actions(block.actions, n), times(n))
            for n, block in zip(lengths, schema.blocks, strict=True)
        ],
        candidates=items(extent.candidates),
        item_columns=[words(g, f, extent.candidates) for g, f in travelling if g == "item"],
    )


class Packer:
    """Puts records into slots of one model's buckets and takes their scores out of the results."""

    def __init__(self, model: ModelConfig, schema: FeatureSchema, layout: Layout, records: RecordLayout) -> None:
        self.model, self.schema, self.layout, self.records = model, schema, layout, records

    def pack(
        self, pieces: Sequence[Piece], bucket: Bucket, places: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[slice]]:
        """A slot's words, and the rows of its scores that belong to each piece.

        Args:
            places: see `RecordLayout.fill`; None: of the rows that the device holds at first.
        """
        slot = served_slot(self.model, self.schema, self.layout, bucket)
        words = np.zeros(slot.words, np.int32)
        places = self._places() if places is None else places
        return words, self.records.fill(slot.views(words), pieces, bucket, self.layout, places)

    def _places(self) -> np.ndarray | None:
        """Of the rows of an item table in host memory that the device holds at first."""
        table = self.records.item_table
        if table is None or not self.model.hot_rows:
            return None
        return places_of(np.arange(hot_rows(self.model, len(table))), len(table))

    def batches(self, golden: Golden, bucket: Bucket) -> list[list[int]]:
        """Numbers of the golden requests that fit the bucket, in as few batches as come without searching."""
        order = sorted(range(len(golden.records)), key=lambda i: -sum(self.records.extent(golden.records[i])))
        batches: list[list[int]] = []
        for number in order:
            for batch in batches:
                extents = [self.records.extent(golden.records[i]) for i in [*batch, number]]
                if fits(extents, bucket, self.layout):
                    batch.append(number)
                    break
            else:
                if fits([self.records.extent(golden.records[number])], bucket, self.layout):
                    batches.append([number])
        return batches


def score_each(packer: Packer, records: Sequence[np.ndarray], bucket: Bucket, run: Run) -> list[np.ndarray]:
    """Scores of records run one by one in a bucket that holds each of them."""
    found = []
    for record in records:
        words, (rows,) = packer.pack([whole(record, packer.records)], bucket)
        found.append(np.asarray(run(words))[rows])
    return found


def whole(record: np.ndarray, records: RecordLayout) -> Piece:
    """All of a record's candidates."""
    return Piece(record, 0, records.extent(record).candidates)


def reference_bucket(schema: FeatureSchema, layout: Layout) -> Bucket:
    """The smallest bucket that holds any golden request."""
    candidates = layout.aligned(MAX_CANDIDATES)
    return Bucket(layout.aligned(schema.history_rows) + candidates, candidates)
