"""Records: encoded, then written into a slot, against an expectation built one value at a time."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import MAX_TIME, Bucket, Extent, Layout, Place, place, slot_layout
from flame_jax.record import BlockEvents, Piece, RecordLayout
from flame_jax.schema import Feature, FeatureSchema
from tests.test_schema import schemas

ROWS = st.integers(0, 2**31 - 1)
TIMES = st.integers(0, MAX_TIME)
Value = int | float


class Event(NamedTuple):
    """One event of a block's history."""

    item: int
    action: int
    time: int


class Logical(NamedTuple):
    """What a record says, as Python numbers."""

    scenario: int
    time: int
    user: list[Value]
    context: list[Value]
    blocks: list[list[Event]]
    candidates: list[int]
    items: list[list[Value]]


def values(feature: Feature) -> st.SearchStrategy[Value]:
    if feature.kind == "numeric":
        return st.floats(width=32, allow_nan=False)
    return st.integers(0, feature.limit - 1)


def rows_of(features: tuple[Feature, ...]) -> st.SearchStrategy[list[Value]]:
    return st.tuples(*map(values, features)).map(list)


def travelling(schema: FeatureSchema) -> tuple[Feature, ...]:
    """Item features that are no column of a table on the device."""
    return tuple(f for f in schema.item_features if f.source != "table")


@st.composite
def logicals(draw: st.DrawFn, schema: FeatureSchema) -> Logical:
    events = st.lists(st.builds(Event, ROWS, st.integers(0, schema.actions - 1), TIMES), max_size=schema.block_length)
    candidates = draw(st.lists(ROWS, min_size=1, max_size=9))
    return Logical(
        scenario=draw(st.integers(0, len(schema.scenarios) - 1)),
        time=draw(TIMES),
        user=draw(rows_of(schema.user_features)),
        context=draw(rows_of(schema.context_features)),
        blocks=[draw(events) for _ in schema.blocks],
        candidates=candidates,
        items=[draw(rows_of(travelling(schema))) for _ in candidates],
    )


def word(value: Value) -> int:
    """The int32 that carries a value's bits."""
    bits: int = struct.unpack("<i", struct.pack("<f" if isinstance(value, float) else "<i", value))[0]
    return bits


def words(found: list[Value]) -> np.ndarray:
    return np.array([word(value) for value in found], np.int32)


def encoded(layout: RecordLayout, schema: FeatureSchema, logical: Logical) -> np.ndarray:
    blocks = [
        BlockEvents(*(np.array([event[column] for event in events], np.int32) for column in range(3)))
        for events in logical.blocks
    ]
    return layout.encode(
        scenario=logical.scenario,
        request_time=logical.time,
        request_words=words(logical.user + logical.context),
        blocks=blocks,
        candidates=np.array(logical.candidates, np.int32),
        item_columns=[words([item[k] for item in logical.items]) for k in range(len(travelling(schema)))],
    )


def expect(
    slot: dict[str, np.ndarray],
    schema: FeatureSchema,
    row: int,
    where: Place,
    logical: Logical,
    low: int,
    high: int,
) -> None:
    """Set what one written piece must leave in a slot, value by value."""
    tokens = slot["item"].shape[1]
    request = [where.history_start, where.candidate_start, high - low, logical.scenario, logical.time]
    for at, value in enumerate(request + [len(events) for events in logical.blocks]):
        slot["rows"][row, at] = value
    for group, features, found in (
        ("user", schema.user_features, logical.user),
        ("context", schema.context_features, logical.context),
    ):
        for feature, number in zip(features, found, strict=True):
            slot[f"{group}.{feature.name}"][row] = number
    for block, events in enumerate(logical.blocks):
        for k, event in enumerate(events):
            slot["item"][block, where.history_start + k] = event.item
            slot["action"][block, where.history_start + k] = event.action
            slot["time"][block, where.history_start + k] = event.time
        for k, candidate in enumerate(logical.candidates[low:high]):
            slot["item"][block, where.candidate_start + k] = candidate
            slot["action"][block, where.candidate_start + k] = schema.actions
            slot["time"][block, where.candidate_start + k] = logical.time
    for k, item in enumerate(logical.items[low:high]):
        for feature, number in zip(travelling(schema), item, strict=True):
            column = slot[f"item.{feature.name}"]
            column[where.candidate_start + k - (tokens - len(column))] = number


class Some(NamedTuple):
    """Pieces of requests, and a bucket with some room to spare."""

    logical: list[Logical]
    bounds: list[tuple[int, int]]
    extents: list[Extent]
    layout: Layout
    bucket: Bucket

    @property
    def wheres(self) -> list[Place]:
        """Where they go."""
        return place(self.extents, self.bucket, self.layout)


@st.composite
def batches(draw: st.DrawFn, schema: FeatureSchema) -> Some:
    logical = draw(st.lists(logicals(schema), min_size=1, max_size=3))
    bounds = []
    for one in logical:
        low = draw(st.integers(0, len(one.candidates) - 1))
        bounds.append((low, draw(st.integers(low + 1, len(one.candidates)))))
    extents = [Extent(max(map(len, one.blocks)), high - low) for one, (low, high) in zip(logical, bounds, strict=True)]
    layout = Layout(align=draw(st.sampled_from([1, 4])), max_requests=4)
    aligned = [layout.aligned_extent(extent) for extent in extents]
    candidates = sum(extent.candidates for extent in aligned) + layout.align
    bucket = Bucket(sum(extent.history for extent in aligned) + candidates, candidates)
    return Some(logical, bounds, extents, layout, bucket)


@settings(max_examples=90)
@given(schemas(), st.data())
def test_written_pieces_leave_exactly_their_values_in_the_slot(schema: FeatureSchema, data: st.DataObject) -> None:
    records, some = RecordLayout(schema), data.draw(batches(schema))
    slots = slot_layout(schema, some.layout, some.bucket)
    buffer = np.random.default_rng(0).integers(-(2**31), 2**31, slots.words).astype(np.int32)
    expected = buffer.copy()
    for row, (one, where, (low, high)) in enumerate(zip(some.logical, some.wheres, some.bounds, strict=True)):
        records.write(slots.views(buffer), row, where, encoded(records, schema, one), low, high)
        expect(slots.views(expected), schema, row, where, one, low, high)
    np.testing.assert_array_equal(buffer, expected)


@settings(max_examples=90)
@given(schemas(), st.data())
def test_a_batch_leaves_what_its_pieces_do_and_candidates_actions_and_times_between_them(
    schema: FeatureSchema, data: st.DataObject
) -> None:
    records, some = RecordLayout(schema), data.draw(batches(schema))
    slots = slot_layout(schema, some.layout, some.bucket)
    buffer = np.random.default_rng(0).integers(-(2**31), 2**31, slots.words).astype(np.int32)
    slots.views(buffer)["rows"][:] = 0
    expected = buffer.copy()
    pieces = [
        # As it comes from another process: read-only.
        Piece(np.frombuffer(encoded(records, schema, one).tobytes(), np.int32), low, high)
        for one, (low, high) in zip(some.logical, some.bounds, strict=True)
    ]
    rows = records.fill(slots.views(buffer), pieces, some.bucket, some.layout)
    wheres, bucket = some.wheres, some.bucket
    for row, (one, where, (low, high)) in enumerate(zip(some.logical, wheres, some.bounds, strict=True)):
        expect(slots.views(expected), schema, row, where, one, low, high)
    for name in ("action", "time"):
        tail = wheres[-1].candidate_start
        gaps = slots.views(buffer)[name][:, tail:], slots.views(expected)[name][:, tail:]
        inside = np.zeros(bucket.tokens - tail, bool)
        for where, extent in zip(wheres, some.extents, strict=True):
            inside[where.candidate_start - tail : where.candidate_start - tail + extent.candidates] = True
        gaps[1][:, ~inside] = gaps[0][:, ~inside]  # nobody's rows
    np.testing.assert_array_equal(buffer, expected)
    base = bucket.tokens - bucket.candidates
    assert rows == [
        slice(where.candidate_start - base, where.candidate_start - base + extent.candidates)
        for where, extent in zip(wheres, some.extents, strict=True)
    ]


@settings(max_examples=50)
@given(schemas(), st.data())
def test_a_records_extent_is_its_longest_block_and_its_candidates(schema: FeatureSchema, data: st.DataObject) -> None:
    records = RecordLayout(schema)
    logical = data.draw(logicals(schema))
    longest = max(len(events) for events in logical.blocks)
    assert records.extent(encoded(records, schema, logical)) == (longest, len(logical.candidates))


@settings(max_examples=50)
@given(schemas(), st.data())
def test_a_record_is_one_plain_buffer_of_words(schema: FeatureSchema, data: st.DataObject) -> None:
    logical = data.draw(logicals(schema))
    record = encoded(RecordLayout(schema), schema, logical)
    assert record.dtype == np.int32
    assert record.flags.c_contiguous
    again = np.frombuffer(record.tobytes(), np.int32)
    assert RecordLayout(schema).extent(again) == RecordLayout(schema).extent(record)
