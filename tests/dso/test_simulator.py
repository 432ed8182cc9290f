"""Simulated time: examples worked by hand, and what must hold of every run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.config import DispatchConfig
from flame_jax.dso.costs import CostModel
from flame_jax.dso.policy import State, Wait
from flame_jax.dso.scheduler import Limits, Scheduler
from flame_jax.dso.simulator import Arrival, Report, Simulator
from flame_jax.dso.start import make_scheduler
from flame_jax.dso.work import Status
from flame_jax.packing import Extent
from tests.dso.fakes import LADDER, LARGE, LAYOUT, SMALL, scheduler

COSTS = {SMALL: [1.0, 1.5], LARGE: [3.0, 4.5]}


def simulate(
    arrivals: list[Arrival], *, lanes: int = 1, depth: int = 1, host: float = 0.0, limits: Limits | None = None
) -> Report:
    books = scheduler(lanes=lanes, depth=depth, costs=CostModel(COSTS), limits=limits)
    return Simulator(books, CostModel(COSTS), host=host).run(arrivals)


def ends(report: Report) -> list[float]:
    return [end.time for end in sorted(report.ended, key=lambda end: end.arrival.time)]


def times(report: Report) -> list[float]:
    return [time for ran in report.ran for time in (ran.begun, ran.ended)]


def test_by_hand_one_lane_runs_batch_after_batch() -> None:
    # A large request, 0 to 3; meanwhile two small ones come, which share a batch from 3 to 4.
    report = simulate([Arrival(0.0, Extent(0, 32)), Arrival(0.5, Extent(4, 4)), Arrival(1.0, Extent(4, 4))])
    assert ends(report) == pytest.approx([3.0, 4.0, 4.0])
    assert [(ran.bucket, ran.requests) for ran in report.ran] == [(LARGE, 1), (SMALL, 2)]
    assert times(report) == pytest.approx([0.0, 3.0, 3.0, 4.0])
    assert report.mean_latency() == pytest.approx((3.0 + 3.5 + 3.0) / 3)
    assert report.padding() == pytest.approx(1 - (32 + 16) / (64 + 16))
    assert report.occupancy(1) == pytest.approx(1.0)
    assert report.pairs_per_second() == pytest.approx(40 / 4.0)


def test_by_hand_two_lanes_slow_each_other_down() -> None:
    # The large batch alone until 1.0: a third is done. Then both run: the small one for 1.5 s, to 2.5, in which the
    # large one does 1.5 / 4.5 more. The last third takes 1 s alone.
    report = simulate([Arrival(0.0, Extent(0, 32)), Arrival(1.0, Extent(4, 4))], lanes=2)
    assert ends(report) == pytest.approx([3.5, 2.5])
    assert report.occupancy(2) == pytest.approx((3.5 + 1.5) / 7.0)


def test_by_hand_the_host_launches_one_batch_after_the_other() -> None:
    report = simulate([Arrival(0.0, Extent(0, 8)), Arrival(0.0, Extent(0, 32))], lanes=2, host=0.25)
    # Launched by 0.25 and 0.5; the first runs alone for 0.25, then 0.75 of it is left, at 1.5 s for the whole.
    first = 0.5 + 0.75 * 1.5
    assert ends(report)[0] == pytest.approx(first)
    assert ends(report)[1] == pytest.approx(first + (1 - (first - 0.5) / 4.5) * 3.0)


def test_by_hand_a_second_batch_queues_behind_the_first_on_its_lane() -> None:
    report = simulate([Arrival(0.0, Extent(0, 32)), Arrival(0.1, Extent(0, 32))], depth=2)
    assert times(report) == pytest.approx([0.0, 3.0, 3.0, 6.0])


def test_what_is_over_by_the_time_a_lane_is_free_never_runs() -> None:
    report = simulate([Arrival(0.0, Extent(0, 32)), Arrival(0.1, Extent(0, 8), patience=1.0)])
    assert [end.status for end in report.ended] == [Status.REFUSED, Status.OK]
    assert len(report.ran) == 1
    assert [end.arrival.time for end in report.in_time()] == [0.0]


class Never:
    def decide(self, state: State) -> Wait:
        return Wait(float("inf"))


def test_a_policy_that_leaves_requests_waiting_for_ever_is_told_of() -> None:
    books = Scheduler(LADDER, LAYOUT, CostModel(COSTS), Never(), Limits(), lanes=1, depth=1)
    with pytest.raises(RuntimeError, match="for ever"):
        Simulator(books, CostModel(COSTS)).run([Arrival(0.0, Extent(0, 8))])


REQUESTS = st.lists(
    st.builds(
        Arrival,
        time=st.floats(0, 10),
        extent=st.builds(Extent, st.integers(0, 16), st.integers(1, 100)),
        patience=st.sampled_from([0.5, 2.0, 5.0, 1e9]),
        traffic_class=st.integers(0, 1),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.sampled_from(["deadline_cost", "descending"]), st.integers(1, 3), st.integers(1, 2))
def test_every_request_ends_once_and_every_batch_runs(
    arrivals: list[Arrival], policy: str, lanes: int, depth: int
) -> None:
    config = DispatchConfig(policy=policy, executors=depth, max_queue=10, target_wait_ms=500.0)  # type: ignore[arg-type]
    books = make_scheduler(config, LAYOUT, COSTS, shares=[2.0, 1.0], lanes=lanes)
    arrivals = sorted(arrivals, key=lambda arrival: arrival.time)
    report = Simulator(books, CostModel(COSTS), host=0.01).run(arrivals)
    assert sorted(map(id, (end.arrival for end in report.ended))) == sorted(map(id, arrivals))
    assert all(end.time >= end.arrival.time for end in report.ended)
    for lane in range(lanes):
        ran = sorted((each for each in report.ran if each.lane == lane), key=lambda each: each.begun)
        assert all(first.ended <= then.begun + 1e-9 for first, then in pairwise(ran))
    for one in report.ran:
        assert one.ended - one.begun >= COSTS[one.bucket][0] - 1e-6
        assert one.rows <= one.bucket.tokens
    assert sum(end.status is Status.OK for end in report.ended) == len(report.answered())
