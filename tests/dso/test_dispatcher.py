"""The dispatcher over fake executors whose answers can be worked out by hand."""

from __future__ import annotations

import random
import threading
import time

import pytest

from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.scheduler import Refused
from flame_jax.dso.work import Status
from flame_jax.packing import Extent, fits
from tests.dso.fakes import (
    LARGE,
    LAYOUT,
    RECORDS,
    SMALL,
    STAGES,
    Desk,
    FakeExecutor,
    Lab,
    fake_lane,
    ok,
    record,
    scheduler,
    wait_until,
)


def test_a_request_is_scored_and_timed() -> None:
    desk = Desk()
    desk.submit(7, candidates=5)
    done = desk.finish()[7]
    assert ok(done, 5)
    assert done.batches == 1
    assert done.queue_ns >= 0
    assert done.assemble_ns > 0
    assert done.compute_ns > 0


def test_a_small_request_takes_the_cheapest_bucket() -> None:
    desk = Desk()
    desk.submit(1, history=4, candidates=8)
    desk.finish()
    assert desk.lab.buckets == [SMALL]
    assert desk.dispatcher.launched == {SMALL: 1, LARGE: 0}


@pytest.mark.parametrize("executors", [1, 3])
def test_scores_of_a_split_request_come_in_candidate_order(executors: int) -> None:
    desk = Desk(executors=executors)
    desk.submit(3, history=16, candidates=203)
    desk.wait(3)
    done = desk.finish()[3]
    assert ok(done, 203)
    pieces = [piece for batch in desk.lab.batches for piece in batch]
    assert done.batches == len(pieces) == 7
    assert [piece[1:] for piece in pieces] == [(low, min(low + 32, 203)) for low in range(0, 203, 32)]


def test_waiting_requests_share_a_batch_and_get_their_own_scores(held: Desk) -> None:
    held.block()
    for ticket in range(4):
        held.submit(ticket, history=ticket, candidates=ticket + 1)
    answers = held.finish()
    assert all(ok(answers[ticket], ticket + 1) for ticket in range(4))
    assert [[ticket for ticket, _, _ in batch] for batch in held.lab.batches] == [[999], [0, 1, 2, 3]]


def test_no_batch_is_larger_than_its_bucket_or_has_too_many_requests(held: Desk) -> None:
    held.block()
    chosen = random.Random(5)
    sizes = {ticket: Extent(chosen.randrange(17), chosen.randrange(1, 50)) for ticket in range(60)}
    for ticket, (history, candidates) in sizes.items():
        held.submit(ticket, history=history, candidates=candidates)
    answers = held.finish()
    assert all(ok(answers[ticket], size.candidates) for ticket, size in sizes.items())
    for bucket, batch in zip(held.lab.buckets[1:], held.lab.batches[1:], strict=True):
        extents = [Extent(sizes[ticket].history, high - low) for ticket, low, high in batch]
        assert fits(extents, bucket, LAYOUT)


def test_the_earliest_deadline_goes_first_and_the_lower_ticket_among_equals(held: Desk) -> None:
    held.block()
    now = time.monotonic_ns()
    due = {5: 900, 1: 500, 8: 300, 4: 500, 2: 700, 3: 500}
    for ticket, seconds in due.items():  # each fills the largest bucket, so that none shares a batch
        held.hand_in(ticket, record(ticket, candidates=32), now + seconds * 10**9)
    held.finish()
    assert held.lab.filled()[1:] == [8, 1, 3, 4, 2, 5]


def test_an_urgent_latecomer_overtakes_the_rest_of_a_split_request(held: Desk) -> None:
    held.submit(1, candidates=96, seconds=500)
    held.lab.wait_batches(1)
    held.submit(2, candidates=32, seconds=100)
    answers = held.finish()
    assert ok(answers[1], 96)
    assert ok(answers[2], 32)
    assert [[ticket for ticket, _, _ in batch] for batch in held.lab.batches] == [[1], [2], [1], [1]]


def test_a_request_whose_deadline_has_passed_is_never_filled() -> None:
    desk = Desk()
    desk.submit(1, seconds=-1)
    done = desk.wait(1)[1]
    assert (done.status, done.scores, done.batches) == (Status.EXPIRED, None, 0)
    assert desk.lab.batches == []
    desk.submit(2)
    assert ok(desk.finish()[2])


def test_a_request_that_expires_while_it_waits_is_never_filled(held: Desk) -> None:
    held.block()
    deadline = held.submit(1, seconds=0.01)
    held.submit(2)
    wait_until(deadline)
    answers = held.finish()
    assert answers[1].status is Status.EXPIRED
    assert ok(answers[2])
    assert held.lab.filled() == [999, 2]


def test_a_request_that_expires_between_its_pieces_is_answered_once_and_costs_no_more(held: Desk) -> None:
    deadline = held.submit(1, candidates=96, seconds=0.2)
    held.lab.wait_batches(1)
    wait_until(deadline)
    answers = held.finish()
    assert answers[1].status is Status.EXPIRED
    assert answers[1].scores is None
    assert len(held.lab.batches) == 1


def test_a_request_whose_last_piece_is_in_flight_at_its_deadline_is_answered_once(held: Desk) -> None:
    deadline = held.submit(1, seconds=0.2)
    held.lab.wait_batches(1)
    wait_until(deadline)
    assert list(held.finish()) == [1]


def test_a_full_queue_refuses_and_takes_again_once_there_is_room() -> None:
    desk = Desk(max_queue=3, open=False)
    desk.block()
    for ticket in range(3):
        desk.submit(ticket)
    with pytest.raises(Refused):
        desk.submit(3)
    assert desk.dispatcher.queued == 3
    desk.lab.let(True)
    desk.wait(0, 1, 2)
    desk.submit(4)
    answers = desk.finish()
    assert sorted(answers) == [0, 1, 2, 4, 999]
    assert all(map(ok, answers.values()))
    assert desk.dispatcher.queued == 0


def test_cancelling_makes_room_in_a_full_queue() -> None:
    desk = Desk(max_queue=1, open=False)
    desk.block()
    desk.submit(1)
    desk.dispatcher.cancel(1)
    desk.submit(2)
    assert sorted(desk.finish()) == [2, 999]


def test_a_request_cancelled_while_it_waits_is_neither_filled_nor_answered(held: Desk) -> None:
    held.block()
    held.submit(1)
    held.submit(2)
    held.dispatcher.cancel(1)
    assert sorted(held.finish()) == [2, 999]
    assert held.lab.filled() == [999, 2]


def test_a_request_cancelled_in_flight_is_not_answered(held: Desk) -> None:
    held.submit(1, candidates=32)
    held.lab.wait_batches(1)
    held.submit(2, candidates=32)
    held.dispatcher.cancel(1)
    answers = held.finish()
    assert sorted(answers) == [2]
    assert ok(answers[2], 32)


def test_cancelling_one_request_of_a_batch_in_flight_leaves_its_neighbours_right(held: Desk) -> None:
    held.block()
    for ticket in (1, 2, 3):
        held.submit(ticket)
    held.lab.let_one()
    held.lab.wait_batches(2)
    held.dispatcher.cancel(2)
    answers = held.finish()
    assert sorted(answers) == [1, 3, 999]
    assert all(map(ok, answers.values()))


def test_the_rest_of_a_request_cancelled_between_its_pieces_is_never_filled(held: Desk) -> None:
    held.submit(1, candidates=96)
    held.lab.wait_batches(1)
    held.dispatcher.cancel(1)
    assert held.finish() == {}
    assert len(held.lab.batches) == 1


def test_cancelling_what_is_done_unknown_or_cancelled_changes_nothing() -> None:
    desk = Desk()
    desk.submit(1)
    desk.wait(1)
    for ticket in (1, 1, 12345):
        desk.dispatcher.cancel(ticket)
    desk.submit(2)
    answers = desk.finish()
    assert sorted(answers) == [1, 2]


def test_an_expired_request_that_is_cancelled_late_is_answered_once() -> None:
    desk = Desk()
    desk.submit(1, seconds=-1)
    desk.wait(1)
    desk.dispatcher.cancel(1)
    assert [done.status for done in desk.finish().values()] == [Status.EXPIRED]


def test_a_split_request_is_answered_only_once_all_its_pieces_are_scored() -> None:
    desk = Desk(executors=3, open=False)
    desk.submit(1, candidates=96)
    desk.lab.wait_batches(3)
    for _ in range(2):
        desk.lab.let_one()
    desk.submit(2, candidates=32)  # taken by an executor that has come back, so two pieces are in
    desk.submit(3, candidates=32)
    desk.lab.wait_batches(5)
    assert desk.done == []
    answers = desk.finish()
    assert ok(answers[1], 96)


def test_stopping_finishes_what_is_queued_and_refuses_more(held: Desk) -> None:
    held.block()
    for ticket in range(1, 30):
        held.submit(ticket, candidates=30)
    stopper = threading.Thread(target=held.dispatcher.stop)
    stopper.start()
    refused = False
    for ticket in range(1000, 1000 + 10**6):
        try:
            held.submit(ticket)
        except Refused:
            refused = True
            break
        held.dispatcher.cancel(ticket)
    assert refused
    assert stopper.is_alive()
    held.lab.let(True)
    stopper.join(20)
    assert not stopper.is_alive()
    answers = held.finish()
    assert all(ok(answers[ticket], 30) for ticket in range(1, 30))


def test_an_idle_dispatcher_stops_and_may_be_stopped_twice() -> None:
    desk = Desk()
    desk.stop()
    assert desk.finish() == {}


def test_cancelling_the_last_waiting_request_lets_a_stopping_dispatcher_end(held: Desk) -> None:
    held.block()
    held.submit(1)
    stopper = threading.Thread(target=held.dispatcher.stop, daemon=True)
    stopper.start()
    held.dispatcher.cancel(1)
    held.lab.let(True)
    stopper.join(20)
    assert not stopper.is_alive()
    assert sorted(held.finish()) == [999]


def test_every_bucket_needs_its_executors_on_each_lane() -> None:
    few = [FakeExecutor(SMALL, Lab())]
    with pytest.raises(ValueError, match="every bucket needs 1"):
        Dispatcher([few], scheduler(), RECORDS, on_done=lambda done: None, on_fatal=lambda: None)
    with pytest.raises(ValueError, match="1 lanes, not 2"):
        Dispatcher([fake_lane(Lab())], scheduler(lanes=2), RECORDS, on_done=lambda done: None, on_fatal=lambda: None)


def test_as_many_batches_fly_as_there_are_executors_and_no_more() -> None:
    desk = Desk(executors=3, open=False)
    for ticket in range(5):
        desk.submit(ticket, candidates=32)
    desk.lab.wait_batches(3)
    desk.submit(5, candidates=1)
    assert desk.dispatcher.queued == 3
    assert len(desk.lab.batches) == 3
    answers = desk.finish()
    assert all(ok(answers[ticket], 32) for ticket in range(5))


@pytest.mark.parametrize("seed", range(12))
def test_under_random_interleavings_every_request_ends_exactly_once(seed: int) -> None:
    chosen = random.Random(seed)
    desk = Desk(executors=chosen.randint(1, 3), max_queue=40)
    desk.lab.jitter = chosen.choice([0.0, 0.0005, 0.002])
    failures = seed % 3 == 0
    sizes = {ticket: chosen.choice([1, 3, 8, 32, 33, 100]) for ticket in range(120)}
    submitted: list[int] = []
    refused: set[int] = set()
    cancelled: set[int] = set()
    late: set[int] = set(chosen.sample(sorted(sizes), 10))
    ended = threading.Event()

    def submit(tickets: list[int], order: random.Random) -> None:
        for ticket in tickets:
            if failures and order.random() < 0.1:
                desk.lab.plan(order.choice(STAGES), ticket, RuntimeError("planned"))
            try:
                history, seconds = order.randrange(17), -0.001 if ticket in late else order.uniform(50, 100)
                desk.submit(ticket, history=history, candidates=sizes[ticket], seconds=seconds)
                submitted.append(ticket)
            except Refused:
                refused.add(ticket)
                time.sleep(0.001)

    def cancel(order: random.Random) -> None:
        while not ended.is_set():
            if submitted:
                ticket = submitted[-1 - order.randrange(min(len(submitted), 8))]
                if ticket % 3 == 0:
                    cancelled.add(ticket)
                    desk.dispatcher.cancel(ticket)
            time.sleep(order.uniform(0, 0.0005))

    tickets = list(sizes)
    threads = [threading.Thread(target=submit, args=(tickets[k::2], random.Random(seed + k))) for k in range(2)]
    canceller = threading.Thread(target=cancel, args=(random.Random(seed + 2),))
    for thread in (*threads, canceller):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    canceller.join()

    answers = desk.finish()
    assert set(submitted) - cancelled <= set(answers) <= set(submitted)
    assert set(submitted) | refused == set(sizes)
    for ticket, done in answers.items():
        if done.status is Status.EXPIRED:
            assert ticket in late
        elif done.status is Status.OK:
            assert ok(done, sizes[ticket])
            assert ticket not in late
        else:
            assert failures
    assert not late & set(desk.lab.filled())
    assert desk.dispatcher.queued == 0
