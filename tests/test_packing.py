"""The packed batch: where pieces lie, and how a slot is divided into fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import Bucket, Extent, Layout, fits, place, row_width, slot_layout
from flame_jax.schema import Block, Feature, FeatureSchema
from tests.test_schema import schemas

LAYOUTS = st.builds(Layout, align=st.sampled_from([1, 2, 4, 8]), max_requests=st.integers(1, 6))
EXTENTS = st.lists(st.builds(Extent, history=st.integers(0, 20), candidates=st.integers(1, 20)), max_size=7)


@st.composite
def buckets(draw: st.DrawFn, layout: Layout) -> Bucket:
    """A bucket on the layout's alignment."""
    tokens = draw(st.integers(1, 100 // layout.align))
    return Bucket(tokens * layout.align, draw(st.integers(1, tokens)) * layout.align)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Extent], Bucket, Layout]:
    """Pieces, whether or not they fit, and a bucket for them."""
    layout = draw(LAYOUTS)
    return draw(EXTENTS), draw(buckets(layout)), layout


@st.composite
def fitting_batches(draw: st.DrawFn) -> tuple[list[Extent], Bucket, Layout]:
    """Pieces in a bucket with little or no room to spare."""
    extents = draw(EXTENTS)
    layout = Layout(draw(st.sampled_from([1, 2, 4, 8])), max(1, len(extents)))
    candidates = sum(up(e.candidates, layout.align) for e in extents) + layout.align * draw(st.integers(0, 1))
    histories = sum(up(e.history, layout.align) for e in extents) + layout.align * draw(st.integers(0, 1))
    candidates = max(candidates, layout.align)
    return extents, Bucket(histories + candidates, candidates), layout


def up(rows: int, align: int) -> int:
    """The first multiple of `align` at or above `rows`, by counting."""
    return next(n for n in range(rows, rows + align) if n % align == 0)


def could_lie(extents: list[Extent], bucket: Bucket, layout: Layout) -> bool:
    """What `fits` promises, one row at a time."""
    candidate_rows = [row for e in extents for row in range(up(e.candidates, layout.align))]
    history_rows = [row for e in extents for row in range(up(e.history, layout.align))]
    return (
        len(extents) <= layout.max_requests
        and len(candidate_rows) <= bucket.candidates
        and len(candidate_rows) + len(history_rows) <= bucket.tokens
    )


@settings(max_examples=200)
@given(batches())
def test_place_raises_exactly_when_the_pieces_do_not_fit(batch: tuple[list[Extent], Bucket, Layout]) -> None:
    expected = could_lie(*batch)
    assert fits(*batch) is expected
    if expected:
        assert len(place(*batch)) == len(batch[0])
    else:
        with pytest.raises(ValueError, match="do not fit"):
            place(*batch)


@settings(max_examples=200)
@given(fitting_batches())
def test_placed_pieces_are_aligned_disjoint_and_inside_their_parts(
    batch: tuple[list[Extent], Bucket, Layout],
) -> None:
    extents, bucket, layout = batch
    taken: list[int] = []
    for where, extent in zip(place(*batch), extents, strict=True):
        assert where.history_start % layout.align == where.candidate_start % layout.align == 0
        assert where.candidate_start >= bucket.tokens - bucket.candidates
        taken += range(where.history_start, where.history_start + up(extent.history, layout.align))
        taken += range(where.candidate_start, where.candidate_start + up(extent.candidates, layout.align))
    assert len(set(taken)) == len(taken), "two pieces share a row"
    assert set(taken) <= set(range(bucket.tokens))


@settings(max_examples=100)
@given(fitting_batches(), st.data())
def test_pieces_that_fit_still_fit_without_one_of_them(
    batch: tuple[list[Extent], Bucket, Layout], data: st.DataObject
) -> None:
    extents, bucket, layout = batch
    assert fits(extents, bucket, layout)
    if extents:
        gone = data.draw(st.integers(0, len(extents) - 1))
        assert fits(extents[:gone] + extents[gone + 1 :], bucket, layout)


def test_histories_grow_from_the_left_and_candidates_from_the_right() -> None:
    layout = Layout(align=4, max_requests=4)
    places = place([Extent(5, 3), Extent(0, 6), Extent(4, 1)], Bucket(32, 20), layout)
    assert places == [(0, 28), (8, 20), (8, 16)]


def test_no_piece_at_all_fits_and_takes_no_place() -> None:
    assert place([], Bucket(64, 64), Layout()) == []


@settings(max_examples=50)
@given(LAYOUTS, st.integers(0, 100), st.integers(0, 100))
def test_alignment_rounds_both_parts_up_to_the_next_multiple(layout: Layout, history: int, candidates: int) -> None:
    expected = Extent(up(history, layout.align), up(candidates, layout.align))
    assert layout.aligned_extent(Extent(history, candidates)) == expected


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Layout(align=0), "align"),
        (lambda: Layout(align=-4), "align"),
        (lambda: Layout(align=3), "align"),
        (lambda: Layout(align=48), "align"),
        (lambda: Layout(max_requests=0), "max_requests"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(make: Callable[[], Layout], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"layout\.{reason}"):
        make()


@pytest.mark.parametrize(
    "bucket",
    [Bucket(0, 0), Bucket(64, 0), Bucket(64, -16), Bucket(64, 80), Bucket(72, 16), Bucket(64, 24), Bucket(-64, -64)],
    ids=str,
)
def test_a_bucket_off_the_alignment_or_without_room_has_no_slot(bucket: Bucket) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        slot_layout(FeatureSchema(), Layout(align=16), bucket)


@settings(max_examples=50)
@given(schemas(), LAYOUTS, st.data())
def test_fields_lie_in_the_slot_aligned_and_without_overlap_and_views_write_through(
    schema: FeatureSchema, layout: Layout, data: st.DataObject
) -> None:
    slot = slot_layout(schema, layout, data.draw(buckets(layout)))
    buffer = np.full(slot.words, -1, np.int32)
    views = slot.views(buffer)
    assert len(views) == len(slot.fields)
    for mark, view in enumerate(views.values()):
        view.view(np.int32)[...] = mark
    marks, counts = np.unique(buffer[buffer >= 0], return_counts=True)
    assert marks.tolist() == list(range(len(views)))
    assert counts.tolist() == [view.size for view in views.values()], "two fields share a word"
    assert not any(field.offset * 4 % 256 for field in slot.fields), "kernels read fields in place"
    assert (buffer < 0).sum() < 64 * len(views), "more words than alignment needs belong to no field"


@settings(max_examples=50)
@given(schemas(), LAYOUTS, st.data())
def test_a_slot_has_the_shapes_that_its_schema_and_bucket_say(
    schema: FeatureSchema, layout: Layout, data: st.DataObject
) -> None:
    bucket = data.draw(buckets(layout))
    slot = slot_layout(schema, layout, bucket)
    blocks = len(schema.blocks)
    expected: dict[str, tuple[tuple[int, ...], str]] = {"rows": ((layout.max_requests, 5 + blocks), "<i4")}
    expected |= dict.fromkeys(("item", "action", "time"), ((blocks, bucket.tokens), "<i4"))
    for group, features, length in (
        ("item", schema.item_features, bucket.candidates),
        ("user", schema.user_features, layout.max_requests),
        ("context", schema.context_features, layout.max_requests),
    ):
        for feature in features:
            if feature.source == "table":
                continue
            expected[f"{group}.{feature.name}"] = ((length,), "<f4" if feature.kind == "numeric" else "<i4")
    views = slot.views(np.zeros(slot.words, np.int32))
    assert {name: (view.shape, view.dtype.str) for name, view in views.items()} == expected


def test_features_of_one_name_in_two_groups_have_fields_of_their_own() -> None:
    schema = FeatureSchema(
        blocks=(Block("a"), Block("b")),
        item_features=(Feature("x", "numeric"),),
        user_features=(Feature("x", "bits", 3),),
        context_features=(Feature("x", "categorical", 3),),
    )
    names = [field.name for field in slot_layout(schema, Layout(), Bucket(128, 64)).fields]
    assert names == ["rows", "item", "action", "time", "item.x", "user.x", "context.x"]
    assert row_width(len(schema.blocks)) == 7


def test_buckets_are_named_apart() -> None:
    assert str(Bucket(2048, 512)) == "t2048_c512"
