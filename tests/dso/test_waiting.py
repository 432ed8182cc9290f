"""The queue against a plain list, its two orders, and the limit that follows the devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.dso.waiting import HOLD, INTERVAL, Queue, QueueLimit
from flame_jax.dso.work import Work
from flame_jax.packing import Extent


def work(ticket: int, due: float = 1.0, traffic_class: int = 0, rows: int = 8) -> Work:
    extent = Extent(rows - 4, 4)
    return Work(ticket, np.zeros(0, np.int32), extent, since=0.0, due=due, traffic_class=traffic_class)


def tickets(works: list[Work]) -> list[int]:
    return [each.ticket for each in works]


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "remove", "due"]), st.integers(0, 9), st.integers(0, 2)), max_size=40
)


@settings(max_examples=200)
@given(STEPS)
def test_it_holds_what_a_plain_list_would_in_the_order_of_deadlines(steps: list[tuple[str, int, int]]) -> None:
    queue, plain = Queue([1.0, 2.0, 1.0]), list[Work]()
    for ticket, (step, number, traffic_class) in enumerate(steps):
        if step == "add":
            plain.append(work(ticket, due=number, traffic_class=traffic_class, rows=ticket + 4))
            queue.add(plain[-1])
        elif step == "remove" and plain:
            gone = plain.pop(number % len(plain))
            queue.remove(gone)
            assert not gone.queued
        elif step == "due":
            due = [each for each in plain if each.due <= number]
            assert sorted(tickets(queue.due_by(number))) == sorted(tickets(due))
            plain = [each for each in plain if each.due > number]
        assert len(queue) == len(plain)
        assert queue.rows == sum(each.rows for each in plain)
        assert tickets(queue.front(100, by_share=False)) == tickets(
            sorted(plain, key=lambda each: (each.due, each.ticket))
        )
        assert sorted(tickets(queue.front(100, by_share=True))) == sorted(tickets(plain))
        assert (
            tickets(queue.front(2, by_share=False))
            == tickets(sorted(plain, key=lambda each: (each.due, each.ticket)))[:2]
        )


def test_by_share_a_class_is_served_as_often_as_it_has_shares_and_by_deadline_within() -> None:
    queue = Queue([3.0, 1.0])
    for ticket in range(8):  # class 1 is always more urgent
        queue.add(work(ticket, due=10 + ticket))
        queue.add(work(100 + ticket, due=ticket, traffic_class=1))
    # Virtual times before each choice, 8 rows by 3/4 and 1/4: 0, 0; 10.7, 0; 10.7, 32; 21.3, 32; 32, 32; 42.7, 32.
    assert tickets(queue.front(6, by_share=True)) == [0, 100, 1, 2, 3, 101]


def test_by_share_what_was_served_counts_and_an_absent_class_saves_nothing_up() -> None:
    queue = Queue([1.0, 1.0])
    for ticket in range(4):
        queue.add(work(ticket))
    for _ in range(2):
        first = queue.front(1, by_share=True)[0]
        first.take(4)
        queue.served(first, 1.0)
    queue.add(work(100, traffic_class=1))
    queue.add(work(101, traffic_class=1))
    # Had it saved up, both of class 1 would go first.
    assert tickets(queue.front(4, by_share=True)) in ([2, 100, 3, 101], [100, 2, 101, 3])


def test_by_share_a_class_that_comes_to_an_empty_queue_gets_no_more_than_its_share() -> None:
    queue = Queue([9.0, 1.0])
    for ticket in range(1000):  # long quiet: one at a time
        one = work(ticket)
        queue.add(one)
        one.take(4)
        queue.served(one, 1.0)
    assert len(queue) == 0
    for ticket in range(2000, 2100):
        queue.add(work(ticket, traffic_class=1))
        queue.add(work(10_000 + ticket))
    first = [each.traffic_class for each in queue.front(50, by_share=True)]
    assert first.count(0) == pytest.approx(45, abs=2)


def test_rows_before_a_deadline() -> None:
    queue = Queue([3.0, 1.0])
    for due in range(10):
        queue.add(work(due, due=due, rows=10))
        queue.add(work(100 + due, due=due, traffic_class=1, rows=30))
    assert queue.rows_before(4, 0, by_share=False) == pytest.approx(5 * 10 + 5 * 30)
    assert queue.rows_before(99, 0, by_share=False) == queue.rows
    # Class 0 gets three quarters: while its 50 rows go, another third of them does.
    assert queue.rows_before(4, 0, by_share=True) == pytest.approx(50 / 0.75)
    assert queue.rows_before(99, 1, by_share=True) == queue.rows, "never more than there is"


def test_room_is_made_by_the_class_that_is_the_most_over_its_share() -> None:
    queue = Queue([2.0, 1.0, 1.0])
    for ticket in range(6):
        queue.add(work(ticket, due=ticket, traffic_class=1))
    queue.add(work(50, traffic_class=0))
    queue.add(work(51, traffic_class=2))
    victim = queue.most_over(0, 8)
    assert victim is not None
    assert victim.ticket == 5, "the least urgent"
    assert queue.most_over(1, 8) is None, "it is over its own share"
    alone = Queue([2.0, 1.0, 1.0])
    alone.add(work(1))
    assert alone.most_over(1, 8) is None, "nobody is over their share"


def test_a_standing_queue_is_cut_to_what_is_done_in_time_and_a_burst_is_not() -> None:
    limit = QueueLimit(target=0.02, floor=10, most=1000)
    now = 100.0
    for step in range(40):  # a burst: the backlog is long now and then, and short between
        now += 0.01
        limit.observe(now, 0.5 if step % 5 else 0.0, 10)
    assert (limit.limit, limit.overloaded) == (1000, False)
    for _ in range(40):  # a standing queue, at 5,000 requests a second
        now += 0.01
        limit.observe(now, 0.5, 50)
    assert limit.overloaded
    assert limit.limit == pytest.approx(5000 * 0.02, rel=0.1)


def test_the_limit_grows_again_and_the_overload_ends_soon_after_the_load_has_gone() -> None:
    limit, now = QueueLimit(target=0.02, floor=10, most=1000), 100.0
    for _ in range(40):
        now += 0.01
        limit.observe(now, 0.5, 1)
    assert (limit.limit, limit.overloaded) == (10, True)
    for _ in range(int((HOLD + 3 * INTERVAL) / 0.01)):
        now += 0.01
        limit.observe(now, 0.0, 1)
    assert not limit.overloaded
    assert limit.limit > 10


def test_a_standing_queue_before_slow_batches_is_one_too() -> None:
    limit = QueueLimit(target=0.5, floor=10, most=1000)
    for step in range(20):
        limit.observe(100 + step * 10 * INTERVAL, 30.0, 20)
    assert (limit.limit, limit.overloaded) == (10, True)


def test_after_a_silence_nothing_is_limited() -> None:
    limit, now = QueueLimit(target=0.02, floor=10, most=1000), 100.0
    for _ in range(40):
        now += 0.01
        limit.observe(now, 0.5, 1)
    limit.observe(now + 0.01, 0.0, 1)  # the last of them
    limit.observe(now + 5, 0.0, 1)
    assert (limit.limit, limit.overloaded) == (1000, False)
