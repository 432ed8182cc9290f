"""One version on two devices of one host; run with XLA_FLAGS=--xla_force_host_platform_device_count=2."""

from __future__ import annotations

import gc
import sys

import jax

from flame_jax.dso.lanes import Lane, make_lanes
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.compile import CompileCounter
from flame_jax.fke.engine import Engine
from tests.dso.serving import bits, served
from tests.further import cpu_clients


def main(path: str) -> None:
    """Raise AssertionError where anything differs."""
    devices = jax.devices()
    assert len(devices) == 2, devices
    counter, clients = CompileCounter(), cpu_clients()
    for count in (1, 2):
        lanes = make_lanes(Engine(Artifact(path), devices[0]), count, devices, memory=0.05, clients=clients)
        check(lanes, count)
        ran = served(lanes)
        assert set(ran) == {lane.device for lane in lanes}, ran
        assert len(ran) == 2 * count
        print(f"both devices ran, {count} lanes each: {ran}")
        lanes.clear()
        gc.collect()
        assert not jax.live_arrays(), "weights are still there"  # type: ignore[no-untyped-call]
    assert counter.count == 0


def check(lanes: list[Lane], count: int) -> None:
    """Equal bits everywhere; weights in common on a device and nowhere else."""
    assert [lane.device.id for lane in lanes] == [0] * count + [1] * count
    assert len({tuple(bits(lane.engine)) for lane in lanes}) == 1
    places = [tuple(weight.unsafe_buffer_pointer() for weight in lane.engine._weights) for lane in lanes]
    assert len(set(places[:count])) == len(set(places[count:])) == 1
    assert not set(places[0]) & set(places[-1]), "the second device has weights of its own"


if __name__ == "__main__":
    main(sys.argv[1])
