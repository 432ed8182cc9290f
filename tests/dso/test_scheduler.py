"""The scheduler's books, with the time told by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flame_jax.dso.batching import Batch, Share
from flame_jax.dso.costs import CostModel
from flame_jax.dso.flights import Flight
from flame_jax.dso.policy import Launch
from flame_jax.dso.scheduler import BROKEN, Limits, NoLane, Refused, Scheduler
from flame_jax.dso.work import Done, Status
from flame_jax.packing import Extent
from tests.dso.fakes import LARGE, SMALL, record, scheduler

COSTS = {SMALL: [1.0, 1.5], LARGE: [3.0, 4.5]}


def costs() -> CostModel:
    return CostModel(COSTS)


def put(
    books: Scheduler, ticket: int, now: float = 0.0, *, candidates: int = 4, due: float = 1e6, traffic_class: int = 0
) -> list[Done]:
    """Submit a request of 4 + `candidates` rows."""
    extent = Extent(4, candidates)
    return books.submit(ticket, record(ticket), extent, now=now, due=due, traffic_class=traffic_class)


def launch(books: Scheduler, now: float) -> list[Flight]:
    """Launch whatever the policy wants."""
    flights = []
    while (view := books.view(now)) is not None:
        decision = books.decide(view)
        assert isinstance(decision, Launch)
        flights += [flight for batch in decision.batches if (flight := books.take(batch, view.works, now))]
    return flights


def tickets(flight: Flight) -> list[int]:
    return [part.work.ticket for part in flight.parts]


def statuses(done: list[Done]) -> dict[int, Status]:
    return {each.ticket: each.status for each in done}


def test_batches_go_to_the_lane_that_is_free_first() -> None:
    books = scheduler(lanes=2, depth=2, costs=costs())
    flights = []
    for ticket, candidates in enumerate((32, 4, 4, 4)):
        put(books, ticket, candidates=candidates)
        flights += launch(books, 0.0)
    # A large batch (3 s) on one lane, small ones (1.5 s beside it) on the other, and the fourth where there is room.
    assert [flight.lane for flight in flights] == [0, 1, 1, 0]
    assert [flight.busy for flight in flights] == [1, 2, 2, 2]
    assert books.in_flight == 4


def test_what_a_policy_is_shown() -> None:
    books = scheduler(lanes=2, depth=2, costs=costs())
    put(books, 1, candidates=32)
    (first,) = launch(books, 10.0)
    put(books, 2, 10.5, due=20.0)
    put(books, 3, 10.5, due=15.0)
    view = books.view(11.0)
    assert view is not None
    state = view.state
    assert (state.places, state.idle, state.busy, state.next_idle) == (3, 1, 1, 11.0)
    assert [(w.extent, w.since, w.due) for w in state.waiting] == [
        (Extent(4, 4), 10.5, 15.0),
        (Extent(4, 4), 10.5, 20.0),
    ]
    launch(books, 11.0)
    put(books, 4, 11.0)
    later = books.view(11.0)
    assert later is not None
    assert (later.state.idle, later.state.next_idle) == (0, 11.0 + 1.5), "the second lane, beside the first"
    books.finished(first, 14.0)


def test_arrivals_are_counted_and_forgotten() -> None:
    books = scheduler(costs=costs(), limits=Limits(max_queue=100_000, target_wait=1e9))
    for ticket in range(1000):
        put(books, ticket, ticket / 1000)
    view = books.view(1.0)
    assert view is not None
    assert view.state.arrivals == pytest.approx(1000, rel=0.05)
    later = books.view(2.0)
    assert later is not None
    assert later.state.arrivals < 1


def test_a_batch_refines_the_estimate_by_the_time_since_the_last_one_on_its_lane() -> None:
    model = costs()
    books = scheduler(depth=2, costs=model)
    for ticket in (1, 2):
        put(books, ticket, candidates=4)
        launch(books, 0.0)
    one, two = books.lanes[0].flights
    books.finished(one, 2.0)
    first = model.seconds(SMALL, 1)
    assert 1.0 < first < 2.0
    books.finished(two, 2.0 + first)  # it ran for so long, behind the first
    assert model.seconds(SMALL, 1) == pytest.approx(first)


def test_filling_a_batch_is_no_time_of_its_lane_and_is_reckoned_with_the_next_time() -> None:
    model = costs()
    books = scheduler(costs=model)
    put(books, 1, candidates=4)
    launch(books, 0.0)
    (flight,) = books.lanes[0].flights
    books.began(flight, 0.5, first=True)
    books.finished(flight, 0.5 + model.seconds(SMALL, 1))
    assert model.seconds(SMALL, 1) == pytest.approx(costs().seconds(SMALL, 1))
    for ticket in range(2, 202):
        put(books, ticket, float(ticket), candidates=4)
        launch(books, float(ticket))
        (flight,) = books.lanes[0].flights
        books.began(flight, ticket + 0.5, first=True)
        books.finished(flight, ticket + 1.5)
    put(books, 300, 300.0)
    view = books.view(300.0)
    assert view is not None
    assert view.state.lead == pytest.approx(0.5, rel=0.05)
    launch(books, 300.0)
    assert books.lanes[0].free_at == pytest.approx(300.5 + model.seconds(SMALL, 1), abs=0.05)


def test_the_time_of_a_batch_that_failed_is_not_the_next_ones() -> None:
    books = scheduler(depth=2, costs=costs())
    for ticket in (1, 2):
        put(books, ticket, candidates=4)
        launch(books, 0.0)
    one, two = books.lanes[0].flights
    books.failed(one, 20.0, by_lane=True)
    assert books.running_since() == 20.0
    books.finished(two, 21.0)
    assert books.totals.busy_seconds == pytest.approx(1.0)


def test_work_that_cannot_be_answered_in_time_is_refused_at_once() -> None:
    books = scheduler(costs=costs())
    put(books, 0, candidates=32)
    launch(books, 0.0)  # until 3.0
    put(books, 1, due=3.5)  # nothing waits: it may be tried, estimates may be wrong
    with pytest.raises(Refused):
        put(books, 2, due=3.9)  # 3.0 + 1.0 is later
    put(books, 3, due=4.9)
    assert books.refused == 1


def test_what_has_become_impossible_is_refused_and_what_is_over_expires() -> None:
    books = scheduler(costs=costs())
    put(books, 0, candidates=32)
    launch(books, 0.0)
    put(books, 1, due=3.5)
    put(books, 2, due=9.0)
    assert books.drop(2.0) == []
    assert statuses(books.drop(2.6)) == {1: Status.REFUSED}, "1 s of work does not fit 0.9 s"
    assert statuses(books.drop(9.5)) == {2: Status.EXPIRED}
    assert (books.refused, books.expired) == (1, 1)


def test_what_has_become_impossible_is_refused_beside_a_broken_lane_too() -> None:
    books = scheduler(lanes=2, costs=costs())
    for ticket in range(100, 100 + 2 * BROKEN):
        put(books, ticket, candidates=32)
        for flight in launch(books, 0.0):
            (books.failed(flight, 0.0, by_lane=True) if flight.lane == 0 else books.finished(flight, 0.0))
    assert [lane.alive for lane in books.lanes] == [False, True]
    put(books, 0, candidates=32)
    launch(books, 0.0)
    put(books, 1, due=3.5)
    assert statuses(books.drop(3.0)) == {1: Status.REFUSED}


def test_on_an_idle_lane_the_impossible_is_tried() -> None:
    books = scheduler(costs=costs())
    put(books, 1, due=0.5)
    assert books.drop(0.1) == []
    (flight,) = launch(books, 0.1)
    assert statuses(books.finished(flight, 0.3)) == {1: Status.OK}


def test_a_full_queue_makes_room_for_a_class_that_is_under_its_share() -> None:
    books = scheduler(costs=costs(), limits=Limits(max_queue=4, target_wait=60.0, shares=(3.0, 1.0)))
    put(books, 0, candidates=32)
    launch(books, 0.0)
    for ticket in range(1, 5):
        put(books, ticket, due=1e6 + ticket, traffic_class=1)
    with pytest.raises(Refused):
        put(books, 5, traffic_class=1)
    assert statuses(put(books, 6)) == {4: Status.REFUSED}
    assert len(books.queue) == 4


def test_records_are_given_back_once_and_when_no_batch_reads_them() -> None:
    given: list[int] = []
    books = scheduler(on_left=lambda array: given.append(int(array[2])))
    put(books, 1, candidates=40)
    one, *_ = flights = [*launch(books, 0.0)]
    books.cancel(1)
    assert given == [], "a batch still reads it"
    books.finished(one, 1.0)
    assert given == [1]
    put(books, 2)
    books.cancel(2)
    books.cancel(2)
    put(books, 3, due=5.0)
    books.drop(6.0)
    assert given == [1, 2, 3]
    assert len(flights) == 1


def test_the_rest_of_a_failed_batch_runs_alone_and_the_one_at_fault_fails() -> None:
    books = scheduler(costs=costs())
    for ticket in (1, 2, 3):
        put(books, ticket)
    (flight,) = launch(books, 0.0)
    assert tickets(flight) == [1, 2, 3]
    assert books.failed(flight, 1.0, by_lane=True) == []
    answers: dict[int, Status] = {}
    for _ in range(3):
        (single,) = launch(books, 2.0)
        bad = tickets(single) == [2]
        done = books.failed(single, 3.0, by_lane=True) if bad else books.finished(single, 3.0)
        answers |= statuses(done)
    assert answers == {1: Status.OK, 2: Status.FAILED, 3: Status.OK}
    assert books.works == {}


def test_a_request_in_pieces_fails_only_once_a_piece_has_failed_alone() -> None:
    books = scheduler(depth=2, costs=costs())
    put(books, 1, candidates=40, due=5.0)  # 32 and 8, each piece beside another request
    put(books, 2, candidates=4, due=9.0)
    one, two = launch(books, 0.0)
    put(books, 3, candidates=4, due=9.0)
    assert [tickets(one), tickets(two)] == [[1], [1, 2]]
    assert statuses(books.finished(one, 1.0)) == {}
    assert books.failed(two, 1.0, by_lane=True) == []
    answers: dict[int, Status] = {}
    while books.works:
        for flight in launch(books, 2.0):
            assert len(flight.parts) == 1 or 3 in tickets(flight)
            answers |= statuses(books.finished(flight, 3.0))
    assert answers == dict.fromkeys((1, 2, 3), Status.OK)


def test_two_shared_batches_of_one_request_that_fail_do_not_fail_it() -> None:
    books = scheduler(depth=2, costs=costs())
    put(books, 1, candidates=28 + 28)
    put(books, 2, candidates=4, due=2e6)
    flights = []
    for count, other in ((28, 2), (28, 3)):
        if other == 3:
            put(books, 3, candidates=4, due=2e6)
        view = books.view(0.0)
        assert view is not None
        shares = (Share(0, count), Share(1, 4))
        flight = books.take(Batch(LARGE, shares), view.works, 0.0)
        assert flight is not None
        flights.append(flight)
    assert [tickets(flight) for flight in flights] == [[1, 2], [1, 3]]
    assert [books.failed(flight, 1.0, by_lane=True) for flight in flights] == [[], []]
    answers: dict[int, Status] = {}
    while books.works:
        for flight in launch(books, 2.0):
            assert len(flight.parts) == 1
            answers |= statuses(books.finished(flight, 3.0))
    assert answers == dict.fromkeys((1, 2, 3), Status.OK)


def test_only_what_is_left_of_a_request_counts_as_waiting() -> None:
    books = scheduler(costs=costs())
    put(books, 1, candidates=32 + 8)
    assert books.queue.rows == 4 + 40
    (flight,) = launch(books, 0.0)
    assert books.queue.rows == 4 + 8
    books.failed(flight, 1.0, by_lane=False)
    put(books, 2, candidates=32 + 8)
    (flight,) = launch(books, 2.0)
    books.finished(flight, 3.0)
    books.cancel(2)
    assert books.queue.rows == 0


def test_a_lane_whose_batches_all_fail_is_left_and_its_requests_run_elsewhere() -> None:
    books = scheduler(lanes=2, costs=costs())
    answers: dict[int, Status] = {}
    for ticket in range(20):
        put(books, ticket)
        for flight in launch(books, float(ticket)):
            end = (
                books.failed(flight, ticket + 0.5, by_lane=True)
                if flight.lane == 0
                else books.finished(flight, ticket + 0.5)
            )
            answers |= statuses(end)
    assert [lane.alive for lane in books.lanes] == [False, True]
    lost = [ticket for ticket, status in answers.items() if status is not Status.OK]
    assert len(lost) < BROKEN, "until it counted as broken"
    books.revive(0)
    assert books.lanes[0].alive


def test_where_no_lane_is_left_everybody_is_answered_and_nobody_let_in() -> None:
    books = scheduler(costs=costs())
    done: list[Done] = []
    for ticket in range(BROKEN):
        put(books, ticket, candidates=32)
        (flight,) = launch(books, 0.0)
        put(books, 100 + ticket, candidates=32)
        done += books.failed(flight, 1.0, by_lane=True)
        if ticket < BROKEN - 1:
            books.cancel(100 + ticket)
    assert statuses(done)[100 + BROKEN - 1] is Status.FAILED
    with pytest.raises(NoLane):
        put(books, 500)


def test_one_request_that_fails_in_many_pieces_does_not_break_a_lane() -> None:
    books = scheduler(costs=costs(), depth=4)
    put(books, 1, candidates=32 * 4)
    for flight in launch(books, 0.0):
        books.failed(flight, 1.0, by_lane=True)
    assert books.lanes[0].alive


def test_a_score_that_is_no_number_fails_its_request_alone() -> None:
    books = scheduler(costs=costs())
    put(books, 1)
    put(books, 2)
    (flight,) = launch(books, 0.0)
    flight.parts[0].work.finite = False
    assert statuses(books.finished(flight, 1.0)) == {1: Status.NOT_FINITE, 2: Status.OK}


def test_a_request_that_no_bucket_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="no bucket"):
        scheduler().submit(1, np.zeros(0, np.int32), Extent(64, 1), now=0.0, due=1.0, traffic_class=0)
