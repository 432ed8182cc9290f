"""Lanes: devices and streams on which batches of one version run beside each other.

On a GPU a stream is a PJRT client (`pjrt.Clients`). The first lane of a device is JAX's own client, which holds the
weights; the others share them. Lanes of another device of this machine are the same, with weights of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from flame_jax.fke.engine import Engine
from flame_jax.models.kernel_choice import most_at_once
from flame_jax.pjrt import CLIENTS, Clients, Unsupported, out_of_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """One stream of one device, and the engine that runs on it.

    Attributes:
        engine: warm. Lanes that one client runs beside each other, on the CPU, have the same one.
        index: among all lanes of a version, from 0.
        device: as the lane's client sees it.
    """

    engine: Engine
    index: int
    device: jax.Device


def make_lanes(
    engine: Engine,
    count: int,
    devices: Sequence[jax.Device],
    *,
    memory: float,
    clients: Clients = CLIENTS,
) -> list[Lane]:
    """Bring an engine to every lane, and warm each.

    A lane beyond a device's first is left out where it can't be had: this JAX makes no further clients, they have no
    room, or the artifact's kernels can't run so often at once. The log says which and why; the length of the result is
    how many there are. Dropping the lanes frees executables and weights; clients stay, for versions to come.

    Args:
        engine: on the first of the devices, with its hot rows.
        count: lanes wanted on each device.
        devices: of JAX's own client, all different.
        memory: share of a GPU's memory that each lane but its first may take.

    Returns:
        A device's first lane before its others, which `pjrt.place` relies on.

    Raises:
        ArtifactError: a lane's golden scores differ, or the artifact was not built for one of the devices.
        jax.errors.JaxRuntimeError: a device has no room for its first lane.
    """
    most = most_at_once(engine.manifest.kernels)
    if most is not None and count > most:
        log.warning("%d lanes per device instead of %d: no more kernels of this artifact may run at once", most, count)
        count = most
    engines = []
    for device in devices:
        first = engine.twin(device)
        first.warm()
        engines += [first, *_further(first, clients.streams(device, count, memory)[1:])]
    return [Lane(each, index, each.device) for index, each in enumerate(engines)]


def _further(first: Engine, streams: Iterable[jax.Device]) -> list[Engine]:
    """A device's warm engines on its further streams, until there is no room for one."""
    engines: list[Engine] = []
    for stream in streams:
        try:
            engine = first.twin(stream)
            if engine is not first:
                engine.warm()
        except (Unsupported, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and not out_of_memory(error):
                raise
            version, lane, reason = first.manifest.version, len(engines) + 2, str(error).split("\n", 1)[0]
            log.warning("version %s does without lane %d of %s: %s", version, lane, first.device, reason)
            break
        engines.append(engine)
    return engines


def hand_over_hot_rows(lanes: Sequence[Lane]) -> dict[jax.Device, jax.Array]:
    """By device, the rows of an item table in host memory that it holds at first; see `Engine.hand_over_hot_rows`."""
    engines = {lane.device: lane.engine for lane in lanes}
    found = {device: engine.hand_over_hot_rows() for device, engine in engines.items()}
    return {device: rows for device, rows in found.items() if rows is not None}
