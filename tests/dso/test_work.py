"""A request inside the dispatcher puts its scores together."""

from __future__ import annotations

import numpy as np

from flame_jax.dso.work import Status, Work
from flame_jax.packing import Extent


def work(candidates: int) -> Work:
    return Work(7, np.zeros(0, np.int32), Extent(4, candidates), since=0.0, due=9.0, traffic_class=0)


def scores(*rows: float) -> np.ndarray:
    return np.array([[row, -row] for row in rows], np.float32)


def test_scores_of_a_whole_request_are_not_copied() -> None:
    one, batch = work(2), scores(1, 2, 3, 4)
    one.put(0, batch[1:3], finite=True)
    found = one.done(Status.OK).scores
    assert found is not None
    assert np.shares_memory(found, batch)
    np.testing.assert_array_equal(found, scores(2, 3))


def test_scores_of_pieces_come_in_the_order_of_candidates_whichever_is_first() -> None:
    one = work(5)
    one.put(3, scores(4, 5), finite=True)
    one.put(0, scores(1, 2, 3), finite=False)
    np.testing.assert_array_equal(one.done(Status.OK).scores, scores(1, 2, 3, 4, 5))
    assert not one.finite


def test_what_is_left_of_a_request_counts_its_history_until_all_of_it_is_taken() -> None:
    one = work(5)
    left = [one.rows_left]
    for count in (2, 3):
        one.take(count)
        left.append(one.rows_left)
    assert left == [9, 7, 0]
    one.again(0, 2)
    assert one.rows_left == 6
