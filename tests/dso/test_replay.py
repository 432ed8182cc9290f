"""Replaying a trace: which requests wait together, and the batches of a queue against what the dispatcher would do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.dso import replay as module
from flame_jax.dso.batching import SCAN, next_batch
from flame_jax.dso.replay import Level, arriving_within, drain, replay, together
from flame_jax.fke.buckets import make_ladder
from flame_jax.fke.ladder import largest_for
from flame_jax.packing import Bucket, Extent, Layout
from flame_jax.schema import FeatureSchema

SCHEMA = FeatureSchema(block_length=20)
LAYOUT = Layout(align=4, max_requests=3)
LARGEST = Bucket(48, 16)

QUEUES = st.lists(st.builds(Extent, history=st.integers(0, 20), candidates=st.integers(1, 60)), min_size=1, max_size=20)


def arrays(queue: list[Extent]) -> tuple[np.ndarray, np.ndarray]:
    history, candidates = np.array(queue, np.int64).T
    return history, candidates


@settings(max_examples=150)
@given(QUEUES, st.sampled_from([(), ((16, 8),), ((16, 8), (32, 12))]))
def test_a_queue_makes_the_batches_that_next_batch_makes_of_it_on_any_ladder_with_that_largest_bucket(
    queue: list[Extent], smaller: tuple[tuple[int, int], ...]
) -> None:
    ladder = make_ladder([*smaller, LARGEST], SCHEMA, LAYOUT)
    waiting, expected = list(queue), []
    while waiting:
        shares = next_batch(waiting, ladder, LAYOUT).shares
        pieces = [LAYOUT.aligned_extent(Extent(waiting[place].history, count)) for place, count in shares]
        expected.append((sum(p.history for p in pieces), sum(p.candidates for p in pieces)))
        for place, count in shares:
            waiting[place] = Extent(waiting[place].history, waiting[place].candidates - count)
        waiting = [extent for extent in waiting if extent.candidates]
    assert list(drain(queue, LARGEST, LAYOUT)) == expected


@settings(max_examples=150)
@given(QUEUES)
def test_the_smallest_bucket_that_holds_all_batches_makes_the_same_batches(queue: list[Extent]) -> None:
    history, candidates = arrays(queue)
    levels = [together(len(queue), 4)]
    demand = replay(history, candidates, levels, LARGEST, LAYOUT)
    smaller = largest_for(demand, SCHEMA, LAYOUT)
    again = replay(history, candidates, levels, smaller, LAYOUT)
    for before, after in zip(demand, again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_by_hand_two_levels_weigh_the_same_and_equal_batches_are_one() -> None:
    # Alone: 8+4, 8+4, 4+8 rows; then two together: 16 history and 8 candidate rows, and 4+8 once more.
    history, candidates = np.array([5, 8, 1]), np.array([3, 4, 5])
    demand = replay(history, candidates, [together(3, 1), together(3, 2)], LARGEST, LAYOUT)
    assert demand.tokens.tolist() == [12, 12, 24]
    assert demand.candidates.tolist() == [4, 8, 8]
    np.testing.assert_allclose(demand.weights * 6, [2, 2, 1])


def test_by_hand_a_request_larger_than_the_largest_bucket_leaves_in_pieces_with_its_history() -> None:
    assert list(drain([Extent(5, 40)], LARGEST, LAYOUT)) == [(8, 16), (8, 16), (8, 8)]


def test_a_long_queue_is_drained_from_its_front() -> None:
    queue = [Extent(4, 4)] * (40 * SCAN)
    assert list(drain(queue, LARGEST, LAYOUT)) == [(12, 12)] * (len(queue) // 3) + [(4, 4)] * (len(queue) % 3 > 0)


def test_requests_wait_together_in_groups() -> None:
    assert together(7, 3).queues.tolist() == [[0, 3], [3, 6], [6, 7]]


@settings(max_examples=150)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40).map(sorted), st.integers(1, 20))
def test_a_queue_holds_what_comes_within_a_window_of_its_first(times: list[int], seconds: int) -> None:
    level = arriving_within(np.array(times, np.float64), seconds)
    assert level.members.tolist() == list(range(len(times)))
    for start, stop in level.queues.tolist():
        assert times[stop - 1] - times[start] < seconds
        assert stop == len(times) or times[stop] - times[start] >= seconds


def test_a_sample_takes_whole_queues_from_all_over_the_trace_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SAMPLE", 100)
    level = together(10_000, 4)
    assert level.requests == 100
    assert (level.queues[:, 1] - level.queues[:, 0] == 4).all()
    assert (np.diff(level.queues[:, 0]) > 0).all()
    assert level.queues[0, 0] < 2000
    assert level.queues[-1, 0] > 8000
    assert together(10_000, 4).queues.tolist() == level.queues.tolist()


def test_one_endless_queue_is_cut_to_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 100)
    level = arriving_within(np.zeros(1000), 1.0)
    assert isinstance(level, Level)
    assert level.queues.tolist() == [[0, 100]]
