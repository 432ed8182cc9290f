"""Estimates of how long batches take."""

from __future__ import annotations

import pytest

from flame_jax.dso.costs import OUTLIER, WEIGHT, CostModel
from flame_jax.packing import Bucket

SMALL, LARGE = Bucket(16, 8), Bucket(64, 32)


def test_an_estimate_is_of_the_bucket_and_of_the_lanes_that_are_busy() -> None:
    costs = CostModel({SMALL: [1.0, 1.5], LARGE: [4.0, 7.0]})
    assert [costs.seconds(LARGE, busy) for busy in (0, 1, 2, 3)] == [4.0, 4.0, 7.0, 7.0]


def test_batches_move_their_own_estimate_until_it_is_right() -> None:
    costs = CostModel({SMALL: [1.0, 1.0], LARGE: [4.0, 4.0]})
    costs.observe(SMALL, 1, 2.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(1.0 + WEIGHT)
    for _ in range(300):
        costs.observe(SMALL, 1, 2.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(2.0, rel=1e-3)
    assert costs.table() == {SMALL: [costs.seconds(SMALL, 1), 1.0], LARGE: [4.0, 4.0]}


def test_one_batch_that_was_held_up_counts_as_a_few() -> None:
    costs = CostModel({SMALL: [1.0]})
    costs.observe(SMALL, 1, 1000.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(1.0 + WEIGHT * (OUTLIER - 1))


@pytest.mark.parametrize("measured", [{}, {SMALL: []}, {SMALL: [0.0]}, {SMALL: [1.0], LARGE: [1.0, float("nan")]}])
def test_what_was_not_measured_is_refused(measured: dict[Bucket, list[float]]) -> None:
    with pytest.raises(ValueError, match="measured"):
        CostModel(measured)
