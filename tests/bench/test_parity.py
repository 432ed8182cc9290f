"""What the device comparison calls a difference."""

from __future__ import annotations

import numpy as np
import pytest

from bench.parity import compare


def test_equal_scores_differ_by_nothing() -> None:
    scores = {"a": np.array([0.3, 0.1, 0.2])}
    assert compare(scores, scores) == {
        "largest_score_difference": 0.0,
        "largest_gap_out_of_order": 0.0,
        "users_with_another_order": 0,
    }


def test_the_gap_is_the_references_between_items_that_changed_order() -> None:
    reference = {"a": np.array([0.50, 0.40, 0.10]), "b": np.array([0.9, 0.8])}
    ours = {"a": np.array([0.44, 0.45, 0.10]), "b": np.array([0.7, 0.6])}
    result = compare(reference, ours)
    assert result["largest_gap_out_of_order"] == pytest.approx(0.10)
    assert result["largest_score_difference"] == pytest.approx(0.2)
    assert result["users_with_another_order"] == 1
