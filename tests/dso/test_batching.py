"""The choice of the next batch: properties of every choice, of draining a queue, and examples worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.dso.batching import SCAN, Batch, Share, next_batch
from flame_jax.fke.buckets import Ladder, make_ladder
from flame_jax.packing import Bucket, Extent, Layout, fits
from flame_jax.schema import FeatureSchema

LONGEST = 20
SCHEMA = FeatureSchema(block_length=LONGEST)


@st.composite
def queues(draw: st.DrawFn, *, most: int = 12) -> tuple[list[Extent], Ladder, Layout]:
    """Waiting requests, a ladder whose last bucket holds whatever the others hold, and a layout."""
    layout = Layout(align=draw(st.sampled_from([1, 4, 8])), max_requests=draw(st.integers(1, 5)))
    rows = st.integers(1, 64 // layout.align)
    pairs = [tuple(sorted((draw(rows), draw(rows)), reverse=True)) for _ in range(draw(st.integers(0, 3)))]
    top_candidates = max([draw(rows), *(candidates for _, candidates in pairs)])
    top = (layout.aligned(LONGEST) // layout.align + max(64 // layout.align, top_candidates), top_candidates)
    ladder = make_ladder([(t * layout.align, c * layout.align) for t, c in [*pairs, top]], SCHEMA, layout)
    extents = st.builds(Extent, history=st.integers(0, LONGEST), candidates=st.integers(1, 150))
    return draw(st.lists(extents, min_size=1, max_size=most)), ladder, layout


Queue = tuple[list[Extent], Ladder, Layout]


def pieces(batch: Batch, waiting: list[Extent]) -> list[Extent]:
    return [Extent(waiting[share.position].history, share.candidates) for share in batch.shares]


@settings(max_examples=300)
@given(queues())
def test_a_batch_fits_the_first_bucket_of_the_ladder_that_holds_it(queue: Queue) -> None:
    waiting, ladder, layout = queue
    batch = next_batch(waiting, ladder, layout)
    fitting = [bucket for bucket in ladder if fits(pieces(batch, waiting), bucket, layout)]
    assert batch.bucket == fitting[0]


@settings(max_examples=300)
@given(queues())
def test_the_most_urgent_request_goes_first_and_whole_when_a_bucket_holds_it(queue: Queue) -> None:
    waiting, ladder, layout = queue
    first = next_batch(waiting, ladder, layout).shares[0]
    assert first.position == 0
    if any(fits([waiting[0]], bucket, layout) for bucket in ladder):
        assert first.candidates == waiting[0].candidates
    else:
        assert 0 < first.candidates < waiting[0].candidates
        one_more = Extent(waiting[0].history, first.candidates + 1)
        assert not any(fits([one_more], bucket, layout) for bucket in ladder), "a larger piece would have fitted"


@settings(max_examples=300)
@given(queues())
def test_others_join_in_order_whole_and_nobody_is_left_behind_who_would_fit(queue: Queue) -> None:
    waiting, ladder, layout = queue
    batch = next_batch(waiting, ladder, layout)
    positions = [share.position for share in batch.shares]
    assert positions == sorted(set(positions))
    assert all(share.candidates == waiting[share.position].candidates for share in batch.shares[1:])
    for left in set(range(len(waiting))) - set(positions):
        assert not fits([*pieces(batch, waiting), waiting[left]], ladder[-1], layout)


@settings(max_examples=150)
@given(queues())
def test_batch_after_batch_serves_every_candidate_of_every_request_once(queue: Queue) -> None:
    extents, ladder, layout = queue
    waiting = list(enumerate(extents))
    served: dict[int, list[int]] = {number: [] for number, _ in waiting}
    for _ in range(sum(extent.candidates for extent in extents)):
        if not waiting:
            break
        batch = next_batch([extent for _, extent in waiting], ladder, layout)
        for share in batch.shares:
            number, extent = waiting[share.position]
            served[number].append(share.candidates)
            waiting[share.position] = number, Extent(extent.history, extent.candidates - share.candidates)
        waiting = [(number, extent) for number, extent in waiting if extent.candidates]
    assert not waiting, "a batch served nobody"
    assert {number: sum(parts) for number, parts in served.items()} == {
        number: extent.candidates for number, extent in enumerate(extents)
    }


@settings(max_examples=150)
@given(queues(most=1))
def test_a_request_that_is_alone_leaves_in_as_few_pieces_as_can_be_the_largest_first(queue: Queue) -> None:
    (extent,), ladder, layout = queue
    left, sizes = extent.candidates, []
    while left:
        (share,) = next_batch([Extent(extent.history, left)], ladder, layout).shares
        sizes.append(share.candidates)
        left -= share.candidates
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == -(-extent.candidates // sizes[0])


LAYOUT = Layout(align=4, max_requests=4)
LADDER = (Bucket(16, 8), Bucket(32, 16))


def test_by_hand_a_request_too_long_for_the_rest_waits_while_a_later_one_joins() -> None:
    # Rows, rounded up to 4: 8 + 4, then 4 + 4 (20 of 32), then 12 + 4 (36: too many), then 8 + 4 (32).
    waiting = [Extent(5, 3), Extent(3, 4), Extent(9, 2), Extent(8, 1)]
    expected = Batch(Bucket(32, 16), (Share(0, 3), Share(1, 4), Share(3, 1)))
    assert next_batch(waiting, LADDER, LAYOUT) == expected


def test_by_hand_a_large_request_leaves_in_three_full_pieces_and_a_rest_in_a_small_bucket() -> None:
    # 8 history rows leave 24, of which the bucket gives 16 to candidates: 50 = 16 + 16 + 16 + 2.
    batches = [next_batch([Extent(5, left)], LADDER, LAYOUT) for left in (50, 34, 18, 2)]
    large, small = Bucket(32, 16), Bucket(16, 8)
    assert batches == [Batch(large, (Share(0, 16),))] * 3 + [Batch(small, (Share(0, 2),))]


def test_by_hand_the_rest_of_a_split_request_takes_others_along() -> None:
    # The rest: 8 + 4 rows. Then 0 + 12 rows: 16 candidates, 24 rows. Full for the third.
    waiting = [Extent(5, 2), Extent(0, 12), Extent(0, 1)]
    assert next_batch(waiting, LADDER, LAYOUT) == Batch(Bucket(32, 16), (Share(0, 2), Share(1, 12)))


def test_a_batch_takes_no_more_requests_than_a_slot_has_rows() -> None:
    batch = next_batch([Extent(0, 1)] * 9, (Bucket(64, 64),), LAYOUT)
    assert [share.position for share in batch.shares] == [0, 1, 2, 3]


def test_only_the_front_of_a_long_queue_is_looked_at() -> None:
    roomy = Layout(align=1, max_requests=2 * SCAN)
    batch = next_batch([Extent(0, 1)] * (SCAN + 5), (Bucket(4 * SCAN, 4 * SCAN),), roomy)
    assert len(batch.shares) == SCAN


@pytest.mark.parametrize("history", [29, 32, 1000])
def test_a_history_that_leaves_no_room_for_a_candidate_is_refused(history: int) -> None:
    with pytest.raises(ValueError, match=f"history of {history} rows"):
        next_batch([Extent(history, 1)], LADDER, LAYOUT)
