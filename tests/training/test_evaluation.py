"""AUC, per-user AUC, their intervals and the log loss, against brute force and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_jax.training.evaluation import Quality, difference_interval, evaluate, per_user_auc, table

Event = tuple[int, bool, float]
EVENTS = st.lists(
    st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), max_size=40
)


def brute_force(events: list[Event]) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties counting a half; None without pairs."""
    positives = [score for _, label, score in events if label]
    negatives = [score for _, label, score in events if not label]
    wins = [1.0 if high > low else 0.5 if high == low else 0.0 for high, low in product(positives, negatives)]
    return sum(wins) / len(wins) if wins else None


def columns(events: list[Event]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, labels, scores = zip(*events, strict=True) if events else ((), (), ())
    return np.array(users, np.int64), np.array(labels, np.bool_), np.array(scores, np.float64)


def random_events(users: int, *, per_user: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.random(users * per_user) < 0.5
    scores = 1 / (1 + np.exp(-random.normal(size=labels.size) - labels))
    return np.repeat(np.arange(users), per_user), labels, scores


@given(EVENTS)
def test_each_users_auc_is_the_share_of_ordered_pairs(events: list[Event]) -> None:
    by_user = {user: brute_force([event for event in events if event[0] == user]) for user in range(5)}
    expected = {user: auc for user, auc in by_user.items() if auc is not None}
    found = per_user_auc(*columns(events))
    assert found.users.tolist() == sorted(expected)
    np.testing.assert_allclose(found.aucs, [expected[user] for user in sorted(expected)], atol=1e-12)


@given(EVENTS)
def test_figures_of_evaluate_agree_with_brute_force(events: list[Event]) -> None:
    per_user = per_user_auc(*columns(events)).aucs
    if len(per_user) == 0:
        with pytest.raises(ValueError, match="both labels"):
            evaluate(*columns(events), resamples=1)
        return
    quality = evaluate(*columns(events), resamples=1)
    assert quality.auc == pytest.approx(brute_force(events))
    assert quality.user_auc == pytest.approx(per_user.mean())
    assert (quality.users, quality.events) == (len(per_user), len(events))


def test_hand_worked_users_in_mixed_order() -> None:
    # User 7: 0.9+ 0.4- 0.4+ 0.1-: 3.5 of 4 pairs. User 3: 0.2+ 0.3-: 0 of 1. Users 5 and 9 have one label only.
    users = [7, 3, 7, 5, 7, 3, 7, 5, 9]
    labels = [1, 1, 0, 1, 1, 0, 0, 1, 0]
    scores = [0.9, 0.2, 0.4, 0.8, 0.4, 0.3, 0.1, 0.6, 0.5]
    found = per_user_auc(users, labels, scores)
    assert found.users.tolist() == [3, 7]
    assert found.aucs.tolist() == [0.0, 0.875]
    quality = evaluate(users, labels, scores)
    assert quality.user_auc == 0.4375
    assert (quality.users, quality.events) == (2, 9)


def test_constant_scores_are_worth_one_half_and_infinities_are_ordered() -> None:
    assert per_user_auc([1, 1, 1], [1, 0, 0], [3, 3, 3]).aucs.tolist() == [0.5]
    assert per_user_auc([1, 1, 1], [1, 0, 0], [np.inf, -np.inf, 0.0]).aucs.tolist() == [1.0]


def test_log_loss_by_hand() -> None:
    quality = evaluate([1, 1, 1], [1, 0, 1], [0.8, 0.4, 0.5])
    assert quality.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.6) + math.log(0.5)) / 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_certain_and_wrong_probability_costs_a_finite_loss(dtype: type[np.floating]) -> None:
    quality = evaluate([1, 1], [1, 0], np.array([0.5, 1.0], dtype))
    assert quality.log_loss == pytest.approx((math.log(2) - math.log(np.finfo(dtype).eps)) / 2, rel=1e-6)


def test_interval_holds_the_mean_is_repeatable_and_shrinks_with_users() -> None:
    few, many = (evaluate(*random_events(users), seed=3) for users in (30, 1000))
    assert evaluate(*random_events(30), seed=3) == few
    for quality in (few, many):
        assert 0 < quality.user_auc_low < quality.user_auc < quality.user_auc_high < 1
    ratio = (few.user_auc_high - few.user_auc_low) / (many.user_auc_high - many.user_auc_low)
    assert 3 < ratio < 10  # sqrt(1000 / 30) is 5.8


def test_interval_is_as_wide_as_the_normal_one() -> None:
    users, labels, scores = random_events(1000)
    aucs, quality = per_user_auc(users, labels, scores).aucs, evaluate(users, labels, scores)
    width = 2 * 1.96 * aucs.std() / math.sqrt(len(aucs))
    assert quality.user_auc_high - quality.user_auc_low == pytest.approx(width, rel=0.1)


def test_one_counted_user_has_an_interval_of_no_width() -> None:
    quality = evaluate([1, 1, 2], [1, 0, 1], [0.9, 0.1, 0.5])
    assert quality.user_auc_low == quality.user_auc == quality.user_auc_high == 1.0


def test_difference_is_paired_by_user() -> None:
    users, labels, scores = random_events(200)
    noisy = scores + np.random.default_rng(1).normal(size=scores.size) * 0.1
    mean, low, high = difference_interval(users, labels, scores, noisy, seed=0, resamples=500)
    ours, theirs = (evaluate(users, labels, values.clip(0, 1)) for values in (scores, noisy))
    assert low < mean < high
    assert mean == pytest.approx(ours.user_auc - theirs.user_auc, abs=5e-3)  # clipping adds a few ties
    assert high - low < 0.7 * (ours.user_auc_high - ours.user_auc_low)
    assert difference_interval(users, labels, scores, scores * 5) == (0.0, 0.0, 0.0)


def test_difference_by_hand() -> None:
    # User 1: 1 - 0. User 2: 0.5 - 1. User 3 has one label only.
    users, labels = [1, 1, 2, 2, 3], [1, 0, 1, 0, 1]
    mean, low, high = difference_interval(users, labels, [2, 1, 4, 4, 0], [1, 2, 9, 3, 0])
    assert (mean, low, high) == (0.25, -0.5, 1.0)


@pytest.mark.parametrize("measure", [per_user_auc, evaluate, lambda u, y, p: difference_interval(u, y, p, p)])
@pytest.mark.parametrize(
    ("users", "labels", "scores", "message"),
    [
        ([1, 1, 1], [1, 0], [0.5, 0.5], "one length"),
        ([1, 1], [1, 0], [0.5], "one length"),
        ([[1, 1]], [[1, 0]], [[0.5, 0.5]], "one length"),
        ([1, 1], [1, 4], [0.5, 0.5], "0 or 1"),
        ([1, 1], [1, 0], [0.5, math.nan], "NaN"),
    ],
)
def test_bad_columns_are_refused(
    measure: Callable[..., object], users: list[int], labels: list[int], scores: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(users, labels, scores)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        evaluate([1, 1], [1, 0], [1.5, 0.2])
    with pytest.raises(ValueError, match="resamples"):
        evaluate([1, 1], [1, 0], [0.5, 0.2], resamples=0)
    with pytest.raises(ValueError, match="both labels"):
        difference_interval([1, 2], [1, 0], [0.5, 0.2], [0.5, 0.2])


def test_difference_refuses_two_lengths_of_scores() -> None:
    with pytest.raises(ValueError, match="one length"):
        difference_interval([1, 1], [1, 0], [0.5, 0.2], [0.5])


def test_table_is_aligned() -> None:
    quality = Quality(0.78123, 0.7, 0.68, 0.72, 0.5567, 810, 19633)
    assert table({"item mean": quality, "ours": quality}).splitlines() == [
        "model         AUC  user AUC      95% interval  log loss  users  events",
        "item mean  0.7812    0.7000  0.6800 .. 0.7200    0.5567    810   19633",
        "ours       0.7812    0.7000  0.6800 .. 0.7200    0.5567    810   19633",
    ]
    assert len(table({}).splitlines()) == 1
