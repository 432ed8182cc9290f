"""A history's own checks, against the same rules written one event at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import MAX_TIME
from flame_jax.request import History, RankRequest

Event = tuple[int, int, int]
ACTIONS = 3
GOOD_EVENTS = st.lists(
    st.tuples(st.integers(0, 2**63 - 1), st.integers(0, ACTIONS - 1), st.integers(0, MAX_TIME)), max_size=6
)
ANY_EVENTS = st.lists(
    st.tuples(
        st.sampled_from([-(2**63), -1, 0, 1, 2**32 + 3, 2**63 - 1]),
        st.sampled_from([-1, 0, ACTIONS - 1, ACTIONS]),
        st.sampled_from([-(2**63), -1, 0, 1, MAX_TIME, MAX_TIME + 1, 2**63 - 1]),
    ),
    max_size=4,
)


def history(events: list[Event]) -> History:
    return History(
        np.array([event[0] for event in events], np.int64),
        np.array([event[1] for event in events], np.int32),
        np.array([event[2] for event in events], np.int64),
    )


def is_good(events: list[Event]) -> bool:
    return all(item >= 0 and 0 <= action < ACTIONS and 0 <= time <= MAX_TIME for item, action, time in events) and all(
        before[2] <= after[2] for before, after in pairwise(events)
    )


@settings(max_examples=100)
@given(GOOD_EVENTS)
def test_events_in_range_and_in_order_pass(events: list[Event]) -> None:
    history(sorted(events, key=lambda event: event[2])).check(ACTIONS)


@settings(max_examples=300)
@given(ANY_EVENTS)
def test_events_are_refused_exactly_when_one_is_out_of_range_or_order(events: list[Event]) -> None:
    if is_good(events):
        history(events).check(ACTIONS)
    else:
        with pytest.raises(ValueError, match="history"):
            history(events).check(ACTIONS)


@pytest.mark.parametrize("lengths", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_columns_of_unequal_length_are_refused(lengths: tuple[int, int, int]) -> None:
    ids, actions, times = lengths
    uneven = History(np.zeros(ids, np.int64), np.zeros(actions, np.int32), np.zeros(times, np.int64))
    with pytest.raises(ValueError, match="different lengths"):
        uneven.check(ACTIONS)


def test_events_at_one_time_are_in_order() -> None:
    history([(1, 0, 5), (2, 1, 5), (1, 0, 5)]).check(ACTIONS)


def test_an_empty_history_is_good_for_any_schema() -> None:
    cold = History.empty()
    assert len(cold) == 0
    cold.check(1)


def test_requests_do_not_share_their_default_context() -> None:
    one, other = (RankRequest("u", np.zeros(1, np.int64), scenario=0, request_time=0) for _ in range(2))
    assert one.context == {}
    assert one.context is not other.context
