"""Estimates of how long batches take."""

from __future__ import annotations

import pytest

from flame_jax.dso.costs import LOOK, MEASURED, OUTLIER, STALE, WEIGHT, CostModel, Lead
from flame_jax.packing import Bucket

SMALL, LARGE = Bucket(16, 8), Bucket(64, 32)


def test_an_estimate_is_of_the_bucket_and_of_the_lanes_that_are_busy() -> None:
    costs = CostModel({SMALL: [1.0, 1.5], LARGE: [4.0, 7.0]})
    assert [costs.seconds(LARGE, busy) for busy in (0, 1, 2, 3)] == [4.0, 4.0, 7.0, 7.0]


def test_batches_move_their_own_estimate_until_it_is_right_the_first_ones_most() -> None:
    costs = CostModel({SMALL: [1.0, 1.0], LARGE: [4.0, 4.0]})
    costs.observe(SMALL, 1, 2.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(1.0 + 1 / (MEASURED + 1))
    for _ in range(300):
        costs.observe(SMALL, 1, 2.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(2.0, rel=1e-3)
    assert costs.table() == {SMALL: [costs.seconds(SMALL, 1), 1.0], LARGE: [4.0, 4.0]}
    before = costs.seconds(SMALL, 1)
    costs.observe(SMALL, 1, 4.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(before + WEIGHT * (4.0 - before))


def test_one_batch_that_was_held_up_counts_as_a_few() -> None:
    costs = CostModel({SMALL: [1.0]})
    costs.observe(SMALL, 1, 1000.0)
    assert costs.seconds(SMALL, 1) == pytest.approx(1.0 + (OUTLIER - 1) / (MEASURED + 1))


def test_a_lead_is_mostly_enough_whether_it_is_steady_or_not() -> None:
    steady, varied = Lead(1.0), Lead(1.0)
    for number in range(400):
        steady.observe(3.0)
        varied.observe(2.0 + 2.0 * (number % 2))
    assert steady.seconds == pytest.approx(3.0, rel=1e-3), "the same mean"
    assert varied.seconds == pytest.approx(4.0, rel=0.1), "one more for its spread"
    steady.observe(1000.0)
    assert steady.seconds < 3.5, "what was held up once says little of the next"


@pytest.mark.parametrize(
    ("dear", "cut"),
    [
        ((LARGE, 1), 4.0),  # as dear a token as the small one
        ((SMALL, 1), 2.0),  # no dearer than beside another
        ((SMALL, 2), 2.0),  # no worse than taking turns
    ],
)
def test_what_is_believed_to_be_dear_and_not_tried_is_doubted_and_then_learnt_at_once(
    dear: tuple[Bucket, int], cut: float
) -> None:
    right = {SMALL: [1.0, 2.0], LARGE: [3.0, 6.0]}
    wrong = {bucket: list(seconds) for bucket, seconds in right.items()}
    bucket, busy = dear
    wrong[bucket][busy - 1] = 100.0
    costs = CostModel(wrong)
    others = [(b, n) for b in right for n in (1, 2) if (b, n) != dear]
    for _ in range(STALE + 2 * LOOK):
        for other in others:
            costs.observe(*other, right[other[0]][other[1] - 1])
    assert costs.seconds(*dear) == pytest.approx(cut)
    costs.observe(*dear, right[bucket][busy - 1])
    assert costs.seconds(*dear) == pytest.approx(right[bucket][busy - 1])


@pytest.mark.parametrize("measured", [{}, {SMALL: []}, {SMALL: [0.0]}, {SMALL: [1.0], LARGE: [1.0, float("nan")]}])
def test_what_was_not_measured_is_refused(measured: dict[Bucket, list[float]]) -> None:
    with pytest.raises(ValueError, match="measured"):
        CostModel(measured)
