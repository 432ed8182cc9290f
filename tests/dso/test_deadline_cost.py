"""The policy by due times and costs: decisions by hand, what holds of every decision, and the optimum beside it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.dso.batching import Batch, Share
from flame_jax.dso.deadline_cost import LOOK, DeadlineCost
from flame_jax.dso.descending import Descending
from flame_jax.dso.policy import Launch, State, Wait, Waiting
from flame_jax.packing import Bucket, Extent, Layout, fits
from tests.dso.optimum import LAYOUT, Case, Table, cases, fewest_late, least_total, pieces, run

ALIGN_1, ALIGN_4 = Layout(align=1, max_requests=4), Layout(align=4, max_requests=4)
SMALL, MIDDLE, LARGE = LADDER = (Bucket(16, 8), Bucket(32, 16), Bucket(64, 32))
# Milliseconds: twice the rows cost 1.5 times as much.
COSTS = Table({SMALL: 4.0, MIDDLE: 6.0, LARGE: 9.0}, (1.0, 1.25, 1.5, 1.75))


def asked(
    waiting: list[Waiting], costs: Table = COSTS, layout: Layout = ALIGN_4, **state: float
) -> tuple[Batch, ...] | float:
    """The launch, or until when it waits. At 100 ms; one lane, which is idle, unless told otherwise."""
    policy = DeadlineCost(LADDER, layout, costs, max_wait=state.pop("max_wait", 2.0))
    idle, busy = int(state.pop("idle", 1)), int(state.pop("busy", 0))
    arrivals, next_idle = state.pop("arrivals", 0.0), state.pop("next_idle", 100.0)
    places, lead = int(state.pop("places", max(1, idle))), state.pop("lead", 0.0)
    assert not state
    decision = policy.decide(State(100.0, waiting, arrivals, places, idle, busy, next_idle, lead))
    return decision.batches if isinstance(decision, Launch) else decision.until


def waiting(
    history: int, candidates: int, due: float = math.inf, since: float = 100.0, *, alone: bool = False
) -> Waiting:
    return Waiting(Extent(history, candidates), since, due, alone)


def test_what_fits_one_batch_goes_in_the_cheapest_bucket_that_holds_it() -> None:
    # Rows: 4 + 4 and 8 + 8: 24 tokens, 12 candidates. One batch: 6 + 6. One by one: 4 + (4 + 4).
    assert asked([waiting(3, 2), waiting(8, 7)]) == (Batch(MIDDLE, (Share(0, 2), Share(1, 7))),)
    assert asked([waiting(3, 2)]) == (Batch(SMALL, (Share(0, 2),)),)


def test_costs_decide_which_bucket_is_the_cheapest() -> None:
    odd = Table({SMALL: 9.0, MIDDLE: 6.0, LARGE: 4.0})
    assert asked([waiting(3, 2)], odd) == (Batch(LARGE, (Share(0, 2),)),)


def test_of_a_long_queue_the_bucket_with_the_most_work_per_second_is_filled() -> None:
    # Each of 40 takes 8 + 8 rows. SMALL holds 1 of them (4.0 each), MIDDLE 2 (3.0 each), LARGE 4 (2.25 each).
    queue = [waiting(8, 8)] * 40
    assert asked(queue) == (Batch(LARGE, tuple(Share(n, 8) for n in range(4))),)
    # Where LARGE costs 13, it is 3.25 each, and MIDDLE is the best.
    dear = Table({SMALL: 4.0, MIDDLE: 6.0, LARGE: 13.0})
    assert asked(queue, dear) == (Batch(MIDDLE, (Share(0, 8), Share(1, 8))),)


def test_a_history_that_pieces_repeat_is_no_useful_work() -> None:
    # 12 + 16 rows fill MIDDLE: 6.0. In SMALL four pieces of 12 + 4 would fill every row, for 16.0.
    assert asked([waiting(12, 16)] * 20, Table({SMALL: 4.0, MIDDLE: 9.0, LARGE: 99.0})) == (
        Batch(MIDDLE, (Share(0, 16),)),
    )


def test_others_join_in_order_and_one_that_does_not_fit_is_skipped() -> None:
    # LARGE: 8 + 8, then 24 + 16 (56 tokens, 24 candidates), 4 + 8 is too long by 4, 4 + 4 fits exactly.
    queue = [waiting(8, 8), waiting(24, 16), waiting(4, 8), waiting(4, 4)]
    cheap = Table({SMALL: 8.0, MIDDLE: 8.5, LARGE: 9.0})
    assert asked(queue, cheap) == (Batch(LARGE, (Share(0, 8), Share(1, 16), Share(3, 4))),)


def test_idle_lanes_share_one_request_when_that_is_faster() -> None:
    # 4 + 16 rows: MIDDLE by itself 6.0; two pieces of 4 + 8 in SMALL on two lanes 4.0 * 1.25 = 5.0.
    halves = Batch(SMALL, (Share(0, 8),)), Batch(SMALL, (Share(0, 8),))
    assert asked([waiting(4, 16)], idle=2) == halves
    # On lanes that slow each other more, 4.0 * 1.6 = 6.4: whole.
    slow = Table(COSTS.alone, (1.0, 1.6))
    assert asked([waiting(4, 16)], slow, idle=2) == (Batch(MIDDLE, (Share(0, 16),)),)
    # One place is as good as one lane.
    assert asked([waiting(4, 16)], idle=2, places=1) == (Batch(MIDDLE, (Share(0, 16),)),)


def test_lanes_that_run_count_against_splitting() -> None:
    # Two pieces beside a busy lane: 4.0 * 1.75 = 7.0; whole beside it: 6.0 * 1.1 = 6.6.
    costs = Table(COSTS.alone, (1.0, 1.1, 1.75))
    assert asked([waiting(4, 16)], costs, idle=2, busy=1) == (Batch(MIDDLE, (Share(0, 16),)),)


def test_idle_lanes_share_requests_of_different_sizes_each_whole() -> None:
    # 24 + 32 rows need LARGE, 9.0, and 4 + 4 SMALL, 4.0. Together LARGE holds only the first.
    # On a lane each (factor 1.25) 11.25 + 5.0.
    parts = Batch(LARGE, (Share(0, 32),)), Batch(SMALL, (Share(1, 4),))
    assert asked([waiting(24, 32), waiting(4, 4)], idle=2) == parts


def test_what_is_to_come_is_a_reason_to_take_less_time_in_all() -> None:
    # Two of 8 + 8. Together 6.0: 12.0 for both. One after the other 4.0 and 8.0: 12.0 as well; and with MIDDLE at
    # 6.5, one after the other is better: 12.0 against 13.0. Who comes meanwhile waits for 6.5 or 8.0, so that from
    # (13 - 12) / ((64 - 42.25) / 2) = 0.092 a millisecond it is worse.
    costs, queue = Table({SMALL: 4.0, MIDDLE: 6.5, LARGE: 99.0}), [waiting(8, 8)] * 2
    assert asked(queue, costs, arrivals=0.09, max_wait=0.0) == (Batch(SMALL, (Share(0, 8),)),)
    assert asked(queue, costs, arrivals=0.094, max_wait=0.0) == (Batch(MIDDLE, (Share(0, 8), Share(1, 8))),)


def test_a_request_larger_than_every_bucket_leaves_in_pieces_the_largest_first() -> None:
    # 24 rows leave LARGE 32: 70 = 32 + 32 + 6.
    expected = Batch(LARGE, (Share(0, 32),)), Batch(LARGE, (Share(0, 32),)), Batch(MIDDLE, (Share(0, 6),))
    costs = Table({SMALL: 8.0, MIDDLE: 8.5, LARGE: 9.0}, (1.0, 1.0, 1.0))
    assert asked([waiting(24, 70)], costs, idle=3) == expected
    assert asked([waiting(24, 70)], costs) == expected[:1]


def test_a_tight_due_time_takes_a_smaller_batch() -> None:
    # Together they take MIDDLE, until 106. By itself the first is in time at 104, the second at 108.
    assert asked([waiting(8, 8, 106.0), waiting(8, 8, 109.0)], max_wait=0.0, arrivals=1.0) == (
        Batch(MIDDLE, (Share(0, 8), Share(1, 8))),
    )
    assert asked([waiting(8, 8, 105.0), waiting(8, 8, 109.0)]) == (Batch(SMALL, (Share(0, 8),)),)
    # The lead counts: a batch of 4.0 that starts at 102 ends at 106.
    assert asked([waiting(8, 8, 105.0), waiting(8, 8, 106.0)], lead=2.0) == (Batch(SMALL, (Share(1, 8),)),)


def test_who_cannot_be_in_time_makes_nobody_late_and_is_still_served() -> None:
    # The first would take LARGE, until 109: too late for its 108. The second must be launched now.
    queue = [waiting(24, 32, 108.0), waiting(8, 8, 108.5)]
    assert asked(queue) == (Batch(SMALL, (Share(1, 8),)),)
    assert asked(queue[:1]) == (Batch(LARGE, (Share(0, 32),)),)
    # In time by itself, until 109, it goes first and the other waits.
    assert asked([waiting(24, 32, 109.0), waiting(8, 8, 113.5)]) == (Batch(LARGE, (Share(0, 32),)),)


def test_without_an_idle_lane_it_waits_until_a_lead_and_a_least_batch_before_one_is() -> None:
    queue = [waiting(8, 8)]
    assert asked(queue, idle=0, busy=1, next_idle=107.0, lead=0.5) == 102.5
    assert asked(queue, idle=0, busy=1, next_idle=104.5, lead=0.5) == (Batch(SMALL, (Share(0, 8),)),)
    assert asked(queue, idle=0, busy=1, next_idle=99.0, lead=0.5) == (Batch(SMALL, (Share(0, 8),)),)
    quick = Table({SMALL: 1.0, MIDDLE: 6.0, LARGE: 9.0})
    assert asked([waiting(4, 4)], quick, idle=0, busy=1, next_idle=107.0, lead=0.5) == 105.5


def test_without_an_idle_lane_a_batch_with_nothing_to_gain_is_launched_at_once() -> None:
    # LARGE has the most rows a second: four of 8 + 8 fill its tokens, and max_requests.
    full = Batch(LARGE, tuple(Share(n, 8) for n in range(4)))
    assert asked([waiting(8, 8)] * 4, idle=0, busy=1, next_idle=107.0) == (full,)
    assert asked([waiting(8, 8)] * 3, idle=0, busy=1, next_idle=107.0) == 103.0
    few = Batch(SMALL, tuple(Share(n, 1) for n in range(4)))
    assert asked([waiting(0, 1)] * 4, COSTS, ALIGN_1, idle=0, busy=1, next_idle=107.0) == (few,)
    # Candidates: 32 of 32.
    assert asked([waiting(8, 32)], idle=0, busy=1, next_idle=107.0) == (Batch(LARGE, (Share(0, 32),)),)


def test_the_last_idle_lane_waits_for_company_when_that_is_cheaper() -> None:
    # One of 4 + 4 rows. Another like it comes in 1/arrivals and fits SMALL too.
    # Apart: it waits until the first is done, 4 - gap, then takes 4. Together: the first loses gap, it takes 4.
    # Better when gap + 4 < 8 - gap: gap < 2.
    one = [waiting(4, 4, since=99.5)]
    assert asked(one, arrivals=0.51) == 101.5  # max_wait is 2, after its submission
    assert asked(one, arrivals=0.49) == (Batch(SMALL, (Share(0, 4),)),)
    assert asked(one, arrivals=0.0) == (Batch(SMALL, (Share(0, 4),)),)
    # max_wait has passed.
    assert asked([waiting(4, 4, since=98.0)], arrivals=0.51) == (Batch(SMALL, (Share(0, 4),)),)


def test_it_does_not_wait_for_company_while_another_lane_is_idle() -> None:
    assert asked([waiting(4, 4)], arrivals=0.6, idle=2) == (Batch(SMALL, (Share(0, 4),)),)
    # Beside a busy lane another is free in 4 * 1.25 / 2 = 2.5, on average: then gap + 5 < 2.5 - gap + 5: gap < 1.25.
    assert asked([waiting(4, 4)], arrivals=0.78, busy=1) == (Batch(SMALL, (Share(0, 4),)),)
    assert asked([waiting(4, 4)], arrivals=0.82, busy=1) == 102.0


def test_it_waits_for_company_only_as_long_as_all_stay_in_time() -> None:
    # SMALL with both takes 4.
    assert asked([waiting(4, 4, 105.0)], arrivals=0.6) == 101.0
    assert asked([waiting(4, 4, 105.0)], arrivals=0.6, lead=0.25) == 100.75
    assert asked([waiting(4, 4, 104.0)], arrivals=0.6) == (Batch(SMALL, (Share(0, 4),)),)


def test_it_does_not_wait_for_company_that_would_find_no_room() -> None:
    assert asked([waiting(32, 32)], arrivals=9.0) == (Batch(LARGE, (Share(0, 32),)),)
    few = Batch(SMALL, tuple(Share(n, 1) for n in range(4)))
    assert asked([waiting(0, 1)] * 4, COSTS, ALIGN_1, arrivals=9.0) == (few,)
    # A batch that grows is worth less: 8 + 8 in SMALL, two in MIDDLE. Apart: 4 - gap + 4. Together: gap + 2 + 6.
    assert asked([waiting(8, 8)], arrivals=1e6) == (Batch(SMALL, (Share(0, 8),)),)


def test_a_request_that_must_be_alone_shares_a_batch_with_nobody() -> None:
    queue = [waiting(4, 4), waiting(4, 4, alone=True), waiting(4, 4)]
    flat = Table({SMALL: 4.0, MIDDLE: 4.0, LARGE: 4.0})
    assert asked(queue, flat) == (Batch(SMALL, (Share(0, 4), Share(2, 4))),)
    assert asked(queue[1:], flat) == (Batch(SMALL, (Share(0, 4),)),)
    assert asked(queue[1:2], flat, arrivals=9.0) == (Batch(SMALL, (Share(0, 4),)),)


@pytest.mark.parametrize("idle", [0, 1])
def test_a_history_that_leaves_no_room_for_a_candidate_is_refused(idle: int) -> None:
    with pytest.raises(ValueError, match="history of 61 rows"):
        asked([waiting(61, 1), waiting(1, 1)], idle=idle, busy=1 - idle)


def test_no_more_than_the_front_of_a_long_queue_is_looked_at() -> None:
    roomy = Layout(align=1, max_requests=4 * LOOK)
    batch = DeadlineCost((Bucket(512, 512),), roomy, Table({Bucket(512, 512): 1.0}), max_wait=1.0)
    decision = batch.decide(State(100.0, [waiting(0, 1)] * (LOOK + 1), 1e6, 1, 1, 0, 100.0))
    assert decision == Launch((Batch(Bucket(512, 512), tuple(Share(n, 1) for n in range(LOOK))),))


MAX_WAIT = 2.0
REQUESTS = st.lists(
    st.builds(
        waiting,
        st.integers(0, 60),
        st.integers(1, 90),
        st.one_of(st.just(math.inf), st.floats(100.5, 140.0)),
        st.floats(95.0, 100.0),
        alone=st.booleans(),
    ),
    min_size=1,
    max_size=10,
).map(lambda requests: sorted(requests, key=lambda request: request.due))


@st.composite
def states(draw: st.DrawFn) -> State:
    idle, busy = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    places = draw(st.integers(1, 4))
    next_idle = 100.0 if idle else draw(st.floats(99.0, 110.0))
    return State(100.0, draw(REQUESTS), draw(st.floats(0, 3)), places, idle, max(busy, not idle), next_idle, 0.25)


SLOWING = Table(COSTS.alone, (1.0, 1.25, 1.5, 1.75, 2.0))


def decide(state: State) -> Launch | Wait:
    return DeadlineCost(LADDER, ALIGN_4, SLOWING, max_wait=MAX_WAIT).decide(state)


@settings(max_examples=300)
@given(states())
def test_every_batch_fits_and_takes_what_is_there(state: State) -> None:
    decision = decide(state)
    if isinstance(decision, Wait):
        return
    extents = [request.extent for request in state.waiting]
    taken = [0] * len(extents)
    assert 1 <= len(decision.batches) <= min(state.places, max(1, state.idle))
    for batch in decision.batches:
        positions = [share.position for share in batch.shares]
        assert fits(pieces(batch, extents), batch.bucket, ALIGN_4)
        assert len(set(positions)) == len(positions)
        assert len(positions) == 1 or not any(state.waiting[position].alone for position in positions)
        assert all(share.candidates > 0 for share in batch.shares)
        for position, count in batch.shares:
            taken[position] += count
    assert all(count <= extent.candidates for count, extent in zip(taken, extents, strict=True))


@settings(max_examples=300)
@given(states())
def test_the_most_urgent_goes_first_if_it_can_be_in_time(state: State) -> None:
    decision = decide(state)
    history, candidates = state.waiting[0].extent
    fitting = [bucket for bucket in LADDER if fits([Extent(history, candidates)], bucket, ALIGN_4)]
    busy = state.busy + 1 if state.idle else state.busy
    start = max(100.25, state.next_idle)
    in_time = fitting and start + SLOWING.seconds(fitting[0], busy) <= state.waiting[0].due
    if in_time and isinstance(decision, Launch):
        assert decision.batches[0].shares[0].position == 0


@settings(max_examples=300)
@given(states())
def test_it_waits_for_company_never_too_long_and_for_a_lane_never_longer_than_for_it(state: State) -> None:
    decision = decide(state)
    if isinstance(decision, Wait):
        assert decision.until > state.now
        if state.idle:
            assert state.idle == 1
            assert decision.until <= min(request.since for request in state.waiting) + MAX_WAIT
        else:
            least = min(SLOWING.seconds(bucket, state.busy) for bucket in LADDER)
            assert decision.until == state.next_idle - 0.25 - least


@settings(max_examples=150)
@given(REQUESTS, st.integers(1, 3), st.integers(0, 2))
def test_launch_after_launch_serves_every_candidate_once(requests: list[Waiting], idle: int, busy: int) -> None:
    left = list(enumerate(requests))
    for _ in range(sum(request.extent.candidates for request in requests)):
        if not left:
            break
        decision = decide(State(100.0, [request for _, request in left], 0.0, idle, idle, busy, 100.0))
        assert isinstance(decision, Launch)
        for position, count in (share for batch in decision.batches for share in batch.shares):
            number, request = left[position]
            history, candidates = request.extent
            left[position] = number, request._replace(extent=Extent(history, candidates - count))
        assert all(request.extent.candidates >= 0 for _, request in left)
        left = [(number, request) for number, request in left if request.extent.candidates]
    assert not left, "a launch served nobody"


def ours(case: Case) -> DeadlineCost:
    return DeadlineCost(case.ladder, LAYOUT, case.costs, max_wait=0.0)


def test_requests_of_one_size_are_as_seldom_late_as_can_be_on_lanes_that_do_not_slow_each_other() -> None:
    # As can be while the most urgent goes first: giving it up for two others is not for this policy to do.
    for case in cases(1, 400, dated=True, equal=True):
        if case.lanes == 1 or case.costs.factor[1] == 1.0:
            assert run(ours(case), case).late == fewest_late(case, urgent_first=True), case


def test_requests_of_one_size_take_the_least_time_on_one_lane() -> None:
    for case in cases(2, 200, dated=False, equal=True):
        if case.lanes == 1:
            assert run(ours(case), case).total == pytest.approx(least_total(case)), case


def test_requests_of_many_sizes_take_little_longer_than_they_must() -> None:
    # Of 1,150 drawn cases (seeds 9 and 11) the worst took 1.50 times the least, and 1.06 times on average. What it
    # loses by: the most urgent goes first even when it is the longest (1.36 and 1.04 beside schedules that keep to
    # that), others join whole only, and no lane is left idle however much lanes slow each other.
    least = [(case, least_total(case)) for case in cases(3, 25, dated=False)]
    ratios = [run(ours(case), case).total / total for case, total in least]
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) < 1.6
    assert sum(ratios) / len(ratios) < 1.1
    theirs = [run(Descending(case.ladder, LAYOUT), case).total / total for case, total in least]
    assert sum(ratios) < 0.9 * sum(theirs)


def test_requests_of_many_sizes_are_seldom_later_than_they_must() -> None:
    least = [(case, fewest_late(case)) for case in cases(4, 25, dated=True)]
    excess = [run(ours(case), case).late - late for case, late in least]
    assert min(excess) >= 0
    assert max(excess) <= 2
    assert sum(excess) <= 5
    theirs = [run(Descending(case.ladder, LAYOUT), case).late - late for case, late in least]
    assert sum(excess) < sum(theirs) / 2
