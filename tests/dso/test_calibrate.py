"""What batches take on one lane and on several, and how many lanes that is worth."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
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

    def launch(self, bucket: Bucket, words: Any) -> Batch:
        return Batch(self, bucket)

    def work(self, bucket: Bucket) -> None:
        with self._device:
            time.sleep(SECONDS[bucket])
            self.busy += SECONDS[bucket]


class Batch:
    """Runs when its scores are asked for."""

    def __init__(self, engine: Timed, bucket: Bucket) -> None:
        self._engine, self._bucket = engine, bucket

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._engine.work(self._bucket)
        return np.zeros(1)


def lanes_of(at_once: int, monkeypatch: pytest.MonkeyPatch, *, beside: bool = False) -> Any:
    """Four lanes of a device that runs so many batches at once."""
    monkeypatch.setattr(module, "_golden_words", lambda engine, bucket: None)
    device = threading.Semaphore(at_once)
    return [Timed(device, beside=beside) for _ in range(4)]


@pytest.mark.parametrize("beside", [False, True])
def test_lanes_that_take_turns_are_worth_nothing(monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    engines, begun = lanes_of(1, monkeypatch, beside=beside), time.monotonic()
    found = calibrate(engines)
    for bucket, seconds in SECONDS.items():
        assert found[bucket] == pytest.approx([seconds * count for count in (1, 2, 3, 4)], rel=0.4)
    compared = rates(engines, found, 2)
    assert compared == pytest.approx({1: 1.0, 2: 1.0, 4: 1.0}, rel=0.3)
    if beside:
        assert sum(engine.busy for engine in engines) < 0.6 * (time.monotonic() - begun), "others find it free"


def test_lanes_that_run_side_by_side_are_worth_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = lanes_of(4, monkeypatch)
    found = calibrate(engines)
    for bucket, seconds in SECONDS.items():
        assert found[bucket] == pytest.approx([seconds] * 4, rel=0.4)
    compared = rates(engines, found, 2)
    assert compared == pytest.approx({1: 1.0, 2: 2.0, 4: 4.0}, rel=0.3)
    assert best_count(compared) == 4


def test_a_lane_that_always_has_two_batches_may_fill_the_device_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host does between two batches counts for nothing then."""
    engines = lanes_of(1, monkeypatch)
    launched, most = list[Bucket](), 0

    def work(engine: Timed, bucket: Bucket) -> None:
        nonlocal most
        most = max(most, len(launched))
        launched.pop()

    def launch(engine: Timed, bucket: Bucket, words: Any) -> Batch:
        launched.append(bucket)
        return Batch(engine, bucket)

    monkeypatch.setattr(Timed, "work", work)
    monkeypatch.setattr(Timed, "launch", launch)
    for depth in (1, 2, 3):
        most = 0
        rates(engines[:1], {SMALL: [1.0], LARGE: [1.0]}, depth)
        assert (most, launched) == (depth, [])


def test_lanes_are_compared_in_the_bucket_that_costs_the_least_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches leave room for others on a device."""
    engines, used = lanes_of(1, monkeypatch), set[Bucket]()
    monkeypatch.setattr(Timed, "work", lambda engine, bucket: used.add(bucket))
    rates(engines, {SMALL: [1.0] * 4, LARGE: [2.0, 4.0, 6.0, 8.0]}, 2)
    assert used == {LARGE}


def test_more_lanes_are_taken_only_if_they_are_clearly_faster() -> None:
    assert best_count({1: 1.0, 2: 1.6, 4: 1.65}) == 2
    assert best_count({1: 1.0, 2: 1.04, 4: 1.04}) == 1
    assert best_count({1: 1.0, 2: 1.04, 4: 1.08}) == 2
    assert best_count({1: 1.0, 2: 0.9, 4: 1.1}) == 4
    assert best_count({1: 1.0, 2: 1.2, 4: 0.9}) == 2
    assert best_count({1: 1.0}) == 1


def test_a_lane_that_fails_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_golden_words", lambda engine, bucket: None)
    engines: Any = [Timed(threading.Semaphore(1)) for _ in range(3)]

    def fail(bucket: Bucket, words: Any) -> Batch:
        raise RuntimeError("the device")

    engines[1].launch = fail
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
