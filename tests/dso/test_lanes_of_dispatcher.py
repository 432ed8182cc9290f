"""Several lanes: all are used, one that breaks is made anew or left, one that hangs ends the dispatcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from flame_jax.dso.executor import Executor, Scored
from flame_jax.dso.scheduler import BROKEN, Limits, Refused
from flame_jax.dso.work import Status
from flame_jax.record import Piece
from tests.dso.fakes import PATIENCE, Desk, FakeExecutor, fake_lane, ok, record


def slow_to_fill(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Slots are being filled once the first is set, and until the second is."""
    filling, go, fill = threading.Event(), threading.Event(), FakeExecutor.fill

    def slow(self: FakeExecutor, pieces: Sequence[Piece]) -> None:
        filling.set()
        assert go.wait(PATIENCE)
        fill(self, pieces)

    monkeypatch.setattr(FakeExecutor, "fill", slow)
    return filling, go


def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens at once."""
    for _ in range(int(PATIENCE / 0.001)):
        if true():
            return
        time.sleep(0.001)
    pytest.fail("it did not happen")


def test_requests_run_on_all_lanes_at_once() -> None:
    desk = Desk(lanes=3, open=False)
    for ticket in range(3):
        desk.submit(ticket, candidates=32)
    desk.lab.wait_batches(3)
    assert sorted(desk.lab.lanes) == [0, 1, 2]
    answers = desk.finish()
    assert all(ok(answers[ticket], 32) for ticket in range(3))


def test_pieces_of_one_request_that_ran_on_several_lanes_come_in_candidate_order() -> None:
    desk = Desk(lanes=3)
    desk.lab.jitter = 0.002
    for ticket in range(5):
        desk.submit(ticket, candidates=203)
    answers = desk.finish()
    assert all(ok(answers[ticket], 203) for ticket in range(5))
    assert set(desk.lab.lanes) == {0, 1, 2}


def broken_desk(rebuild: bool) -> tuple[Desk, threading.Event]:
    """Two lanes, of which the first is broken; it may be made anew, once told to."""
    go = threading.Event()

    def again(number: int) -> Sequence[Executor]:
        assert go.wait(PATIENCE)
        desk.lab.broken_lanes.clear()
        return fake_lane(desk.lab, 1, number)

    desk = Desk(lanes=2, rebuild=again if rebuild else None)
    desk.lab.broken_lanes.add(0)
    return desk, go


def feed(desk: Desk, first: int, count: int) -> set[int]:
    """Requests one after the other; those that failed."""
    tickets = range(first, first + count)
    for ticket in tickets:
        desk.submit(ticket)
        desk.wait(ticket)
    return {ticket for ticket in tickets if desk.answers()[ticket].status is Status.FAILED}


def test_a_broken_lane_is_left_and_the_others_go_on() -> None:
    desk, _ = broken_desk(rebuild=False)
    assert len(feed(desk, 0, 30)) < BROKEN
    assert desk.dispatcher.lanes_alive == 1
    assert feed(desk, 100, 10) == set()
    desk.finish()


def test_a_broken_lane_is_made_anew_and_runs_again() -> None:
    desk, go = broken_desk(rebuild=True)
    feed(desk, 0, 30)
    assert desk.dispatcher.lanes_alive == 1
    go.set()
    for number in range(100, 1100):
        assert feed(desk, number, 1) == set()
        if desk.dispatcher.lanes_alive == 2 and 0 in desk.lab.lanes[-1:]:
            break
    else:
        pytest.fail("the lane did not come back")
    desk.finish()


def test_without_any_lane_everybody_is_answered_nobody_let_in_and_a_lane_made_anew_serves_again() -> None:
    go = threading.Event()

    def again(number: int) -> Sequence[Executor]:
        assert go.wait(PATIENCE)
        desk.lab.broken_lanes.clear()
        return fake_lane(desk.lab, 1, number)

    desk = Desk(rebuild=again)
    desk.lab.broken_lanes.add(0)
    assert feed(desk, 0, BROKEN) == set(range(BROKEN))
    assert desk.dispatcher.lanes_alive == 0
    with pytest.raises(Refused):
        desk.submit(50)
    go.set()
    for _ in range(1000):
        try:
            desk.submit(51)
            break
        except Refused:
            threading.Event().wait(0.01)
    assert ok(desk.wait(51)[51])
    desk.finish()


@pytest.mark.parametrize("rebuild", [True, False])
def test_a_lane_that_breaks_while_a_last_batch_on_it_succeeds_is_broken_all_the_same(rebuild: bool) -> None:
    made: list[int] = []

    def again(number: int) -> Sequence[Executor]:
        made.append(number)
        return fake_lane(desk.lab, 2, number)

    desk = Desk(executors=2, open=False, rebuild=again if rebuild else None)
    for ticket in range(BROKEN):
        desk.lab.plan("scores", ticket, RuntimeError("planned"))
        desk.submit(ticket, candidates=32)
        if ticket < BROKEN - 1:
            desk.lab.wait_batches(ticket + 1)
            desk.lab.let_one()
            desk.wait(ticket)
    desk.submit(BROKEN, candidates=32)
    desk.lab.wait_batches(BROKEN + 1)
    desk.lab.let_one()
    until(lambda: desk.dispatcher.lanes_alive == 0)
    assert made == [], "a batch is still on it"
    desk.lab.let(True)
    answers = desk.wait(BROKEN - 1, BROKEN)
    assert ok(answers[BROKEN], 32), "it came back good"
    assert answers[BROKEN - 1].status is Status.FAILED, "it was to run elsewhere, and there is no elsewhere"
    if not rebuild:
        desk.wait_fatal()
        desk.stop()
        return
    until(lambda: desk.dispatcher.lanes_alive == 1)
    desk.submit(50)
    assert ok(desk.wait(50)[50])
    assert made == [0]
    desk.finish()


def test_one_lane_that_cannot_be_made_anew_does_not_end_another_that_is_being_made() -> None:
    go, tried = threading.Event(), threading.Event()

    def again(number: int) -> Sequence[Executor]:
        if number == 1:
            tried.set()
            raise RuntimeError("no")
        assert go.wait(PATIENCE)
        desk.lab.broken_lanes.clear()
        return fake_lane(desk.lab, 1, number)

    desk = Desk(lanes=2, rebuild=again)
    desk.lab.broken_lanes |= {0, 1}
    ticket = 0
    while desk.dispatcher.lanes_alive:
        desk.submit(ticket)
        desk.wait(ticket)
        ticket += 1
    assert tried.wait(PATIENCE)
    go.set()
    until(lambda: desk.dispatcher.lanes_alive == 1)
    assert desk.fatal == 0
    desk.submit(1000)
    assert ok(desk.wait(1000)[1000])
    desk.finish()


def test_a_batch_that_is_launched_while_the_dispatcher_dies_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    filling, go = slow_to_fill(monkeypatch)
    desk = Desk(hang_seconds=0.1)
    desk.submit(1)
    assert filling.wait(PATIENCE)
    desk.wait_fatal()
    assert desk.wait(1)[1].status is Status.FAILED
    assert desk.given == []
    go.set()
    desk.stop()
    assert desk.given == [1]


def test_a_lane_that_cannot_be_made_anew_is_left_and_without_any_it_is_fatal() -> None:
    def again(number: int) -> Sequence[Executor]:
        raise RuntimeError("no")

    desk = Desk(rebuild=again)
    desk.lab.broken_lanes.add(0)
    for ticket in range(BROKEN):
        desk.submit(ticket)
        desk.wait(ticket)
    desk.wait_fatal()
    desk.stop()


def test_a_batch_that_hangs_ends_the_dispatcher_and_everybody_is_answered() -> None:
    desk = Desk(open=False, hang_seconds=0.2)
    desk.submit(1)
    desk.lab.wait_batches(1)
    desk.submit(2)
    desk.wait_fatal()
    assert {ticket: done.status for ticket, done in desk.wait(1, 2).items()} == {1: Status.FAILED, 2: Status.FAILED}
    with pytest.raises(Refused):
        desk.submit(3)
    assert not desk.dispatcher.stop(0.1), "its lane still hangs"
    desk.lab.let(True)
    desk.stop()
    assert desk.fatal == 1


def test_a_batch_that_takes_a_while_is_no_hang() -> None:
    desk = Desk(hang_seconds=2.0)
    desk.lab.jitter = 0.05
    assert feed(desk, 0, 10) == set()
    desk.finish()


def test_a_score_that_is_no_number_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = FakeExecutor.scores

    def some_nan(self: FakeExecutor) -> list[Scored]:
        found = scores(self)
        for ticket, each in zip(self._tickets, found, strict=True):
            if ticket == 2:
                each.values[1, 0] = np.nan
        return [Scored(values, bool(np.isfinite(values).all())) for values, _ in found]

    monkeypatch.setattr(FakeExecutor, "scores", some_nan)
    desk = Desk(open=False)
    desk.block()
    for ticket in (1, 2, 3):
        desk.submit(ticket)
    answers = desk.finish()
    assert (answers[2].status, answers[2].scores) == (Status.NOT_FINITE, None)
    assert ok(answers[1])
    assert ok(answers[3])


def test_who_has_to_make_room_is_answered() -> None:
    desk = Desk(open=False, limits=Limits(max_queue=4, target_wait=60.0, shares=(3.0, 1.0)))
    desk.block()
    now = 10**18
    for ticket in range(4):
        desk.hand_in(ticket, record(ticket), now + ticket, traffic_class=1)
    desk.submit(4)
    assert desk.wait(3)[3].status is Status.REFUSED
    answers = desk.finish()
    assert all(ok(answers[ticket]) for ticket in (0, 1, 2, 4))


def test_a_record_goes_back_only_when_its_batch_has_been_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    filling, go = slow_to_fill(monkeypatch)
    desk = Desk()
    desk.submit(1)
    assert filling.wait(PATIENCE)
    desk.dispatcher.cancel(1)
    assert desk.given == [], "a batch is being filled from it"
    go.set()
    desk.finish()
    assert desk.given == [1]
