"""Lanes give the same bits, share weights where they can, are done without where they must be, and go."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jaxlib import _jax

from flame_jax.dso.lanes import Lane, hand_over_hot_rows, make_lanes
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.compile import CompileCounter
from flame_jax.fke.engine import Engine
from flame_jax.fke.manifest import executable_name
from flame_jax.fke.target import Target
from flame_jax.models.kernel_choice import most_at_once
from flame_jax.pjrt import Clients
from tests import tiny
from tests.dso.serving import bits, served
from tests.further import cpu_clients

CLIENTS = cpu_clients()


def lanes_of(folder: Path, count: int, clients: Clients = CLIENTS) -> list[Lane]:
    return make_lanes(Engine(Artifact(folder), tiny.device()), count, [tiny.device()], memory=0.05, clients=clients)


def pointers(engine: Engine) -> list[int]:
    return [weight.unsafe_buffer_pointer() for weight in engine._weights]


def test_lanes_of_several_clients_share_weights_and_give_the_same_bits(pristine: Path) -> None:
    counter = CompileCounter()
    lanes = lanes_of(pristine, 3)
    assert [lane.index for lane in lanes] == [0, 1, 2]
    assert len({id(lane.device.client) for lane in lanes}) == 3
    first, *others = [lane.engine for lane in lanes]
    assert first.device == tiny.device()
    for other in others:
        assert pointers(other) == pointers(first), "weights were copied"
        assert {device for weight in other._weights for device in weight.devices()} == {other.device}
        assert other.manifest is first.manifest
        assert other.vocabularies is first.vocabularies
        assert other.golden_difference == first.golden_difference < 0.005, "it was not warmed up"
        assert bits(other) == bits(first)
    assert counter.count == 0


def test_lanes_of_several_clients_serve_together(pristine: Path) -> None:
    lanes = lanes_of(pristine, 2)
    ran = served(lanes)
    assert set(ran) == {lane.device for lane in lanes}
    assert len(ran) == 2


def test_on_the_cpu_lanes_are_of_one_client_and_one_engine(pristine: Path) -> None:
    lanes = make_lanes(Engine(Artifact(pristine), tiny.device()), 3, [tiny.device()], memory=0.05)
    assert [lane.index for lane in lanes] == [0, 1, 2]
    assert {id(lane.engine) for lane in lanes} == {id(lanes[0].engine)}
    assert set(served(lanes)) == {tiny.device()}


def test_without_a_private_name_there_is_one_lane_that_serves(
    pristine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(_jax, "dlpack_managed_tensor_to_buffer")
    clients = cpu_clients()
    for _ in range(2):
        lanes = lanes_of(pristine, 4, clients)
        assert len(lanes) == 1
    assert caplog.text.count("1 of 4 lanes: this version of JAX lacks") == 1
    assert served(lanes).total() > 0


def failing(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """The golden run of the lane of this number, from 0, fails."""
    right, runs = Engine.warm, iter(range(100))

    def warm(engine: Engine) -> None:
        if next(runs) == number:
            raise error
        right(engine)

    monkeypatch.setattr(Engine, "warm", warm)


EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nmore")


def test_a_lane_without_room_is_done_without(
    pristine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, 2, EXHAUSTED)
    lanes = lanes_of(pristine, 4)
    assert len(lanes) == 2
    assert "version 7 does without lane 3 of cpu:0: RESOURCE_EXHAUSTED: Out of memory" in caplog.text
    assert "more" not in caplog.text
    assert len(served(lanes)) == 2


@pytest.mark.parametrize(
    ("number", "error"),
    [(0, EXHAUSTED), (1, jax.errors.JaxRuntimeError("INTERNAL: no")), (1, ArtifactError("scores are off"))],
)
def test_what_is_wrong_with_a_version_is_not_taken_for_a_lack_of_lanes(
    number: int, error: Exception, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, number, error)
    with pytest.raises(type(error), match=str(error)[:8]):
        lanes_of(pristine, 2)


def test_a_lane_reads_the_artifact_again_and_checks_it(tmp_path: Path) -> None:
    tiny.save_artifact(tmp_path / "model")
    engine = Engine(Artifact(tmp_path / "model"), tiny.device())
    file = tmp_path / "model" / executable_name(tiny.BUCKETS[1])
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not match its hash"):
        engine.twin(CLIENTS.streams(tiny.device(), 2, 0.05)[1])


def test_buckets_that_this_cpu_compiles_anew_have_lanes_too(tmp_path: Path) -> None:
    tiny.save_artifact(tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    manifest["target"]["cpu_features"] = ["avx999"]
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    first, second = (lane.engine for lane in lanes_of(tmp_path / "model", 2))
    assert set(second.recompiled) == set(first.recompiled) == set(tiny.BUCKETS)
    assert pointers(second) == pointers(first)
    assert bits(second) == bits(first)


def test_kernels_that_wait_for_each_other_get_no_more_lanes_than_fit_the_gpu(
    pristine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = {"layer_stack": "mosaic"}
    assert most_at_once(kernels) == 4
    assert most_at_once({"sumi_attention": "mosaic", "layer_stack": "xla"}) is None
    engine = Engine(Artifact(pristine), tiny.device())
    engine.manifest = replace(engine.manifest, kernels=kernels)
    assert len(make_lanes(engine, 6, [tiny.device()], memory=0.05)) == 4
    assert "4 lanes per device instead of 6" in caplog.text


def test_lanes_that_are_dropped_are_freed_and_their_clients_stay(pristine: Path) -> None:
    stream = CLIENTS.streams(tiny.device(), 2, 0.05)[1]

    def held() -> tuple[int, int, int]:
        """Buffers, whoever has them, arrays of the second client, and its executables."""
        gc.collect()
        own, further = (client.live_arrays() for client in (tiny.device().client, stream.client))
        buffers = {array.unsafe_buffer_pointer() for array in (*own, *further) if array.nbytes}
        return len(buffers), len(further), len(stream.client.live_executables())

    before = held()
    for _ in range(2):
        lanes = lanes_of(pristine, 2)
        assert lanes[1].device is stream
        weights = [weakref.ref(weight) for lane in lanes for weight in lane.engine._weights]
        count = len(weights) // 2
        assert held() == (before[0] + count, before[1] + count, before[2] + len(tiny.BUCKETS))
        bits(lanes[1].engine)
        lanes.clear()
        assert held() == before
        assert not any(weight() is not None for weight in weights)


def test_hot_rows_are_taken_once_from_an_engine_that_lanes_have_in_common() -> None:
    class WithRows:
        rows: list[Any] = [np.zeros(2), np.ones(2)]  # noqa: RUF012

        def hand_over_hot_rows(self) -> Any:
            return self.rows.pop()

    engine: Any = WithRows()
    found = hand_over_hot_rows([Lane(engine, index, tiny.device()) for index in range(2)])
    assert list(found) == [tiny.device()]
    assert found[tiny.device()].tolist() == [1, 1]


def test_another_kind_of_device_on_the_host_is_refused(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Artifact(pristine), tiny.device())
    other: Any = type("Other", (), {"platform": "gpu", "process_index": 0, "local_hardware_id": 1})()
    target = Target("cuda", "Other", "8.0", "0.11.2", "", ())
    monkeypatch.setattr("flame_jax.fke.engine.target_of", lambda _: target)
    with pytest.raises(ArtifactError, match="this process has 'cuda'"):
        engine.twin(other)


def test_two_devices_of_a_host_serve_one_version(pristine: Path) -> None:
    """In a process of its own: the number of CPU devices is chosen once."""
    flags = "--xla_force_host_platform_device_count=2"
    ended = subprocess.run(
        [sys.executable, "-m", "tests.dso.two_devices", str(pristine)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "both devices ran" in ended.stdout
