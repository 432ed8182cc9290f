"""What batches take on one lane and on several, and how many lanes that is worth."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flame_jax.config import DispatchConfig
from flame_jax.dso import calibrate as module
from flame_jax.dso.calibrate import best_count, calibrate, rates, start_lanes
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.engine import Engine
from flame_jax.packing import Bucket
from tests import tiny
from tests.dso.fakes import LARGE, SMALL

SECONDS = {SMALL: 0.01, LARGE: 0.02}


class Timed:
    """An engine of a device that runs one batch at a time, or as many as it is asked to."""

    def __init__(self, device: threading.Semaphore, *, beside: bool = False) -> None:
        self._device, self.beside, self.slots = device, beside, dict.fromkeys(SECONDS)
        self.busy = 0.0

    def run(self, bucket: Bucket, words: Any) -> None:
        with self._device:
            time.sleep(SECONDS[bucket])
            self.busy += SECONDS[bucket]


def measured(at_once: int, lanes: int, monkeypatch: pytest.MonkeyPatch, *, beside: bool = False) -> dict[Bucket, Any]:
    monkeypatch.setattr(module, "_golden_words", lambda engine, bucket: None)
    device = threading.Semaphore(at_once)
    engines: Any = [Timed(device, beside=beside) for _ in range(lanes)]
    begun = time.monotonic()
    found = calibrate(engines)
    if beside:
        assert sum(engine.busy for engine in engines) < 0.6 * (time.monotonic() - begun), "others find it free"
    return found


@pytest.mark.parametrize("beside", [False, True])
def test_lanes_that_take_turns_are_worth_nothing(monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    found = measured(1, 4, monkeypatch, beside=beside)
    for bucket, seconds in SECONDS.items():
        assert found[bucket] == pytest.approx([seconds * count for count in (1, 2, 3, 4)], rel=0.4)
    assert best_count(found) == 1


def test_lanes_that_run_side_by_side_are_worth_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(4, 4, monkeypatch)
    for bucket, seconds in SECONDS.items():
        assert found[bucket] == pytest.approx([seconds] * 4, rel=0.4)
    assert best_count(found) == 4


def test_more_lanes_are_taken_only_if_they_are_clearly_faster() -> None:
    assert rates({LARGE: [1.0, 1.25, 3.0, 2.5]}) == {1: 1.0, 2: 1.6, 4: 1.6}
    assert best_count({LARGE: [1.0, 1.25, 3.0, 2.5]}) == 2
    assert best_count({SMALL: [1.0, 1.96, 3.0, 3.9]}) == 1
    assert best_count({SMALL: [1.0]}) == 1


def test_lanes_count_by_the_bucket_that_fills_the_device_best() -> None:
    """Small batches leave room for others on a device, but under load there are none."""
    tokens = LARGE.tokens / SMALL.tokens
    assert best_count({SMALL: [1.0] * 4, LARGE: [0.5 * tokens, tokens, 1.5 * tokens, 2 * tokens]}) == 4
    assert best_count({SMALL: [1.0] * 4, LARGE: [0.2 * tokens, 0.4 * tokens, 0.6 * tokens, 0.8 * tokens]}) == 1


def test_a_lane_that_fails_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_golden_words", lambda engine, bucket: None)
    engines: Any = [Timed(threading.Semaphore(1)) for _ in range(3)]

    def fail(bucket: Bucket, words: Any) -> None:
        raise RuntimeError("the device")

    engines[1].run = fail
    with pytest.raises(RuntimeError, match="the device"):
        calibrate(engines)


@pytest.mark.parametrize(("lanes", "most"), [(3, 3), ("auto", 4)])
def test_a_version_starts_with_its_lanes_and_their_costs(pristine: Path, lanes: Any, most: int) -> None:
    engine = Engine(Artifact(pristine), tiny.device())
    made, costs = start_lanes(engine, DispatchConfig(lanes=lanes), [tiny.device()])
    assert [lane.index for lane in made] == list(range(len(made)))
    assert 1 <= len(made) <= most
    assert lanes == "auto" or len(made) == lanes
    assert costs.keys() == set(engine.manifest.buckets)
    assert all(len(seconds) == len(made) and min(seconds) > 0 for seconds in costs.values())
