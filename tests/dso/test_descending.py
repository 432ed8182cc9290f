"""The paper's policy: schedules by hand, and what holds of every launch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.dso.batching import Batch, Share
from flame_jax.dso.descending import Descending
from flame_jax.dso.policy import Launch, State, Waiting
from flame_jax.fke.buckets import Ladder, capacity
from flame_jax.packing import Bucket, Extent, Layout, fits

LAYOUT = Layout(align=64, max_requests=4)
# Profiles for a history of 1024: 128, 256 and 512 candidates, as wide as they must be.
SMALL, MIDDLE, LARGE = LADDER = (Bucket(1152, 128), Bucket(1280, 256), Bucket(1536, 512))


def waiting(history: int, candidates: int, since: float = 0.0, *, alone: bool = False) -> Waiting:
    return Waiting(Extent(history, candidates), since, math.inf, alone)


def launch(requests: list[Waiting], places: int, *, idle: int = 1, ladder: Ladder = LADDER) -> tuple[Batch, ...]:
    decision = Descending(ladder, LAYOUT).decide(State(9.0, requests, 100.0, places, idle, 1, 9.0))
    assert isinstance(decision, Launch)
    return decision.batches


def test_by_hand_a_request_is_split_from_the_largest_bucket_down() -> None:
    # 1000 = 512 + 256 + 128 + 104, and 104 fill no bucket: they go to the smallest, padded by 24.
    taken = [(LARGE, 512), (MIDDLE, 256), (SMALL, 128), (SMALL, 104)]
    assert launch([waiting(1024, 1000)], 6) == tuple(Batch(bucket, (Share(0, n),)) for bucket, n in taken)


def test_by_hand_what_exceeds_the_smallest_by_one_is_not_padded_to_the_next() -> None:
    assert launch([waiting(1000, 129)], 6) == (Batch(SMALL, (Share(0, 128),)), Batch(SMALL, (Share(0, 1),)))


def test_by_hand_a_longer_history_leaves_less_to_candidates() -> None:
    # 1100 rows round up to 1152: nothing is left of SMALL, 128 of MIDDLE, 384 of LARGE. 600 = 384 + 128 + 88.
    taken = [(LARGE, 384), (MIDDLE, 128), (MIDDLE, 88)]
    assert launch([waiting(1100, 600)], 6) == tuple(Batch(bucket, (Share(0, n),)) for bucket, n in taken)


def test_of_buckets_that_hold_as_many_candidates_the_cheapest_is_taken() -> None:
    assert launch([waiting(0, 128)], 1) == (Batch(SMALL, (Share(0, 128),)),)
    wide = (Bucket(512, 128), *LADDER)
    assert launch([waiting(64, 128)], 1, ladder=wide) == (Batch(wide[0], (Share(0, 128),)),)


def test_first_come_first_served_whatever_is_due_and_never_two_in_a_batch() -> None:
    requests = [waiting(64, 10, since=3.0), waiting(64, 20, since=1.0), waiting(64, 300, since=2.0)]
    expected = [(SMALL, 1, 20), (MIDDLE, 2, 256), (SMALL, 2, 44), (SMALL, 0, 10)]
    for places in range(1, 7):
        batches = [Batch(bucket, (Share(position, n),)) for bucket, position, n in expected[:places]]
        assert launch(requests, places) == tuple(batches)


def test_it_launches_behind_batches_that_run() -> None:
    assert launch([waiting(64, 10)], 1, idle=0) == (Batch(SMALL, (Share(0, 10),)),)


def test_a_history_that_leaves_no_room_for_a_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="history of 1500 rows"):
        launch([waiting(1500, 1)], 1)


REQUESTS = st.lists(
    st.builds(
        waiting, st.integers(0, 1400), st.integers(1, 2000), st.sampled_from([0.0, 1.0, 2.0]), alone=st.booleans()
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200)
@given(REQUESTS, st.integers(1, 12))
def test_every_place_is_used_as_long_as_candidates_are_left_and_pieces_descend(
    requests: list[Waiting], places: int
) -> None:
    batches = launch(requests, places)
    taken: dict[int, list[int]] = {}
    for bucket, shares in batches:
        ((position, count),) = shares
        assert fits([Extent(requests[position].extent.history, count)], bucket, LAYOUT)
        taken.setdefault(position, []).append(count)
    assert len(batches) <= places
    assert [requests[position].since for position in taken] == sorted(requests[position].since for position in taken)
    whole = [sum(counts) == requests[position].extent.candidates for position, counts in taken.items()]
    assert all(whole[:-1]), "a request was left for a later one"
    assert len(batches) == places or (all(whole) and len(taken) == len(requests))
    for position, counts in taken.items():
        history, candidates = requests[position].extent
        assert sum(counts) <= candidates
        assert counts == sorted(counts, reverse=True)
        rooms = {capacity(bucket, history, LAYOUT) for bucket in LADDER} - {0}
        assert counts[0] == max((room for room in rooms if room <= candidates), default=candidates)
