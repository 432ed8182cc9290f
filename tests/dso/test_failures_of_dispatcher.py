"""What fails in a dispatcher: batches, records, its threads; whom it costs an answer, and whom not."""

from __future__ import annotations

import time

import pytest

from flame_jax.dso.flights import Flight
from flame_jax.dso.scheduler import Refused, Scheduler
from flame_jax.dso.work import Done, Status
from tests.dso.fakes import STAGES, Death, Desk, ok, wait_until


@pytest.mark.parametrize("stage", STAGES)
def test_an_executor_that_raises_fails_the_request_at_fault_and_no_other(stage: str, held: Desk) -> None:
    held.block()
    for ticket in (1, 2, 3, 4, 5):  # four of them share the next batch
        held.submit(ticket)
    held.lab.plan(stage, 2, *[RuntimeError("planned")] * 2)
    held.lab.let(True)
    answers = held.wait(999, 1, 2, 3, 4, 5)
    assert (answers[2].status, answers[2].scores) == (Status.FAILED, None)
    assert all(ok(answers[ticket]) for ticket in (999, 1, 3, 4, 5))
    assert held.dispatcher.scheduler.retried == 4
    batches = [sorted(ticket for ticket, _, _ in batch) for batch in held.lab.batches]
    assert all([ticket] in batches for ticket in (1, 3, 4)), "each runs once more, alone"
    for ticket in range(10, 20):  # and it goes on
        held.submit(ticket)
    answers = held.finish()
    assert all(ok(answers[ticket]) for ticket in range(10, 20))


@pytest.mark.parametrize("stage", STAGES)
def test_a_split_request_that_fails_in_its_first_piece_is_answered_once_and_costs_no_more(
    stage: str, held: Desk
) -> None:
    held.block()
    held.submit(1, candidates=320, seconds=10)
    held.submit(2, seconds=20)
    held.lab.plan(stage, 1, RuntimeError("planned"))
    answers = held.finish()
    assert (answers[1].status, answers[1].scores) == (Status.FAILED, None)
    assert ok(answers[2])
    assert sum(ticket == 1 for batch in held.lab.batches for ticket, _, _ in batch) <= 1


def test_a_split_request_of_which_one_piece_ran_again_has_all_its_scores(held: Desk) -> None:
    held.lab.plan("scores", 5, RuntimeError("once"))
    held.block()
    held.submit(3, candidates=33)  # 32, and one that shares a batch
    held.submit(5)
    answers = held.finish()
    assert [(3, 32, 33), (5, 0, 4)] in held.lab.batches
    assert ok(answers[3], 33)
    assert ok(answers[5])
    assert held.dispatcher.scheduler.retried == 2


def test_the_books_are_told_of_every_batch_that_was_launched_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    began, told = Scheduler.began, list[tuple[list[int], bool]]()

    def tell(self: Scheduler, flight: Flight, now: float, *, first: bool) -> None:
        told.append(([part.work.ticket for part in flight.parts], first))
        began(self, flight, now, first=first)

    monkeypatch.setattr(Scheduler, "began", tell)
    desk = Desk()
    desk.lab.plan("launch", 2, RuntimeError("no"))
    for ticket in (1, 2, 3):
        desk.submit(ticket)
        desk.wait(ticket)
    desk.finish()
    assert told == [([1], True), ([3], True)]


def test_a_split_request_fails_once_when_several_of_its_pieces_fail() -> None:
    desk = Desk(executors=3, open=False)
    desk.submit(1, candidates=96)
    desk.lab.wait_batches(3)
    desk.lab.plan("scores", 1, *[RuntimeError("planned")] * 3)
    assert [done.status for done in desk.finish().values()] == [Status.FAILED]


def test_a_cancelled_request_whose_batch_then_fails_is_not_answered(held: Desk) -> None:
    held.submit(1)
    held.lab.wait_batches(1)
    held.lab.plan("scores", 1, RuntimeError("planned"))
    held.dispatcher.cancel(1)
    assert held.finish() == {}


def test_an_expired_request_whose_other_piece_then_fails_is_answered_once() -> None:
    desk = Desk(executors=2, open=False)
    deadline = desk.submit(1, candidates=96, seconds=0.2)
    desk.lab.wait_batches(2)
    wait_until(deadline)
    desk.lab.let_one()
    assert desk.wait(1)[1].status is Status.EXPIRED
    desk.lab.plan("scores", 1, RuntimeError("planned"))
    assert sorted(desk.finish()) == [1]


def test_every_executor_comes_back_after_failures_and_cancellations() -> None:
    desk = Desk(executors=2)
    for ticket in range(40):
        if ticket % 4 == 0:
            desk.lab.plan(STAGES[ticket // 4 % 3], ticket, RuntimeError("planned"))
        desk.submit(ticket, candidates=50)
        if ticket % 5 == 0:
            desk.dispatcher.cancel(ticket)
    desk.wait(*(ticket for ticket in range(40) if ticket % 5))
    desk.submit(100)  # batches end in order: after this one none is in flight
    desk.wait(100)
    desk.lab.let(False)
    before = len(desk.lab.batches)
    for ticket in (201, 202):
        desk.submit(ticket, candidates=32)
    desk.lab.wait_batches(before + 2)
    answers = desk.finish()
    assert ok(answers[201], 32)
    assert ok(answers[202], 32)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dying_thread_says_so_once(stage: str) -> None:
    desk = Desk()
    desk.lab.plan(stage, 1, Death())
    desk.submit(1)
    desk.wait_fatal()
    assert desk.fatal == 1


def test_a_callback_that_raises_ends_the_thread_it_ran_on_and_says_so() -> None:
    desk = Desk()
    desk.on_done_error = RuntimeError("Event loop is closed")
    desk.submit(1)
    desk.wait_fatal()
    assert desk.fatal == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_dispatcher_whose_thread_died_can_still_be_stopped(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.dso.fakes.PATIENCE", 2.0)
    desk = Desk()
    desk.lab.plan(stage, 1, Death())
    desk.submit(1)
    desk.wait_fatal()
    desk.stop()


@pytest.mark.parametrize("stage", ["fill", "scores"])
def test_when_a_thread_dies_everyone_waiting_is_answered_and_nobody_else_is_let_in(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.dso.fakes.PATIENCE", 2.0)
    desk = Desk(open=False)
    desk.block()
    for ticket in (1, 2):
        desk.submit(ticket, candidates=32)
    desk.lab.plan(stage, 1, Death())
    desk.lab.let(True)
    desk.wait_fatal()
    with pytest.raises(Refused):
        desk.submit(3)
    end = time.monotonic() + 2.0
    while time.monotonic() < end and len(desk.done) < 3:
        time.sleep(0.01)
    answers = desk.answers()
    assert sorted(answers) == [1, 2, 999]
    assert Status.FAILED in {done.status for done in answers.values()}


@pytest.mark.parametrize(("history", "candidates"), [(3, 0), (64, 4)])
def test_a_record_that_no_bucket_holds_ends_alone(history: int, candidates: int) -> None:
    desk = Desk()
    try:
        desk.submit(1, history=history, candidates=candidates)
    except ValueError:
        refused = True
    else:
        refused = False
    desk.submit(2)
    answers: dict[int, Done] = desk.wait(2)
    assert desk.fatal == 0, "one record ended the dispatcher for everyone"
    assert ok(answers[2])
    answers = desk.finish()
    assert refused or answers[1].status is Status.FAILED
