"""Negatives drawn by the popularity of an event's period, against counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.request import History
from flame_jax.training.negatives import NO_ITEM, NegativeSampler

WEEK = 100


def history(*events: tuple[int, int]) -> History:
    """Of (item, time) pairs."""
    items, times = np.array(sorted(events, key=lambda event: event[1]), np.int64).reshape(-1, 2).T
    return History(items, np.zeros(len(items), np.int32), times)


EVENTS = st.lists(st.tuples(st.sampled_from([3, 5, 2**40, 7, 9]), st.integers(0, 5 * WEEK)), max_size=12)


@settings(max_examples=100)
@given(st.lists(EVENTS, min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_negative_was_taken_by_another_user_in_the_same_period_and_not_by_this_one(
    users: list[list[tuple[int, int]]], count: int, seed: int
) -> None:
    if not any(users):
        return
    histories = [history(*events) for events in users]
    drawn = NegativeSampler(histories, WEEK).draw(count, np.random.default_rng(seed))
    assert [d.shape for d in drawn] == [(len(h), count) for h in histories]
    for user, (mine, found) in enumerate(zip(histories, drawn, strict=True)):
        for time, row in zip(mine.timestamps.tolist(), found.tolist(), strict=True):
            period = time // WEEK
            taken = {
                i for i, t in zip(mine.item_ids.tolist(), mine.timestamps.tolist(), strict=True) if t // WEEK == period
            }
            others = {
                int(i)
                for number, h in enumerate(histories)
                for i, t in zip(h.item_ids, h.timestamps, strict=True)
                if number != user and t // WEEK == period
            }
            assert set(row) - {NO_ITEM} <= others - taken
            if not others - taken:
                assert set(row) <= {NO_ITEM}


def test_popular_items_are_drawn_as_often_as_they_are_taken() -> None:
    crowd = [history((1, 5)) for _ in range(60)] + [history((2, 5)) for _ in range(30)] + [history((3, WEEK + 5))]
    drawn = NegativeSampler([history((9, 7)), *crowd], WEEK).draw(3000, np.random.default_rng(0))[0]
    counts = Counter(drawn.ravel().tolist())
    assert set(counts) == {1, 2}
    assert counts[1] / counts[2] == pytest.approx(2, rel=0.1)


def test_draws_depend_on_the_generator_alone() -> None:
    histories = [history(*((item, 3) for item in range(user, user + 20))) for user in range(10)]
    sampler = NegativeSampler(histories, WEEK)
    one, same, other = (sampler.draw(2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_user_without_events_has_no_negatives() -> None:
    drawn = NegativeSampler([history((1, 2)), history(), history((4, 2))], WEEK).draw(2, np.random.default_rng(0))
    assert [d.tolist() for d in drawn] == [[[4, 4]], [], [[1, 1]]]
