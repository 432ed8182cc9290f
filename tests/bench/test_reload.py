"""What the reload measurement counts."""

from __future__ import annotations

import pytest

from bench.reload import Call, summary


def test_periods_are_told_apart_by_when_calls_were_due() -> None:
    calls = [Call(9.0, 9.0, "1")]
    calls += [Call(10 + n / 100, 0.001 * (1 + n), "1") for n in range(100)]
    calls += [Call(11 + n / 100, 0.002 * (1 + n), "1" if n < 50 else "2") for n in range(100)]
    result = summary(calls, begin=10.0, seconds=1.0)
    assert result["calls"] == [100, 100]
    assert result["calls_by_version"] == {"1": 50, "2": 50}
    assert result["failed_calls"] == 0
    assert result["p99_ratio"] == pytest.approx(2)
    assert result["longest_ms"] == pytest.approx([100, 200])
    assert summary([*calls, Call(11.5, 0.1, "UNAVAILABLE")], 10.0, 1.0)["failed_calls"] == 1
