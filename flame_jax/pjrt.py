"""PJRT clients and the memory they share: the one module that uses what JAX keeps to itself about them.

A client has one compute stream on each of its devices: batches of one client run one after another on a GPU, those of
two clients at the same time. JAX makes one client; further ones are made here, one stream each, and see the arrays of
JAX's own without a copy. Names are those of JAX 0.11.2; what another version lacks is found when a client is to be
made, and there are none then.

An array that was shared lives until the last array that shares it is gone, and then until the next call of JAX or the
next garbage collection: JAX drops such references where it holds Python's lock anyway.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxlib import _jax, xla_client

OWN_MEMORY = 0.75
"""Share of a GPU's memory that JAX's own client takes, unless XLA_CLIENT_MEM_FRACTION says otherwise."""
LEFT_MEMORY = 0.05
"""Share that no client may take: the CUDA context, loaded programs and libraries live in it."""

_NAMES: Mapping[Any, Sequence[str]] = {
    xla_client: ("generate_pjrt_gpu_plugin_options", "make_c_api_client"),
    _jax: ("buffer_to_dlpack_managed_tensor", "dlpack_managed_tensor_to_buffer"),
}

log = logging.getLogger(__name__)

Maker = Callable[[jax.Device, float, int], Any]
"""Makes a client that sees a device: the device, the share of its memory that the client may take, and how many further
clients it has with this one."""


class Unsupported(Exception):
    """This JAX, or this device, can't do it; the message is one line."""


class Clients:
    """Further clients of this process. They stay until it ends: versions to come use them again, where a client per
    version would pile up streams. Thread-safe.

    Args:
        makers: by a device's platform, how further clients are made.
    """

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self._makers = makers
        self._made: dict[jax.Device, list[tuple[Any, jax.Device]]] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def streams(self, device: jax.Device, count: int, memory: float) -> list[jax.Device]:
        """A device as so many clients see it: itself first, then its twins, each with a stream of its own.

        Where further clients are not made at all, on the CPU, it is itself `count` times: there one client runs batches
        beside each other. Where they can't be made there are fewer, and the log says why, once.

        Args:
            device: of JAX's own client.
            memory: share of its memory that each further client may take for temporaries, slots and scores.
        """
        if device.platform == "cpu" and "cpu" not in self._makers:
            return [device] * count
        with self._lock:
            made = self._made.setdefault(device, [])
            try:
                while len(made) < count - 1:
                    made.append(self._make(device, memory, len(made) + 1))
            except Unsupported as error:
                self._tell(f"{device} has {len(made) + 1} of {count} lanes: {error}")
            return [device, *(twin for _, twin in made[: count - 1])]

    def _make(self, device: jax.Device, memory: float, number: int) -> tuple[Any, jax.Device]:
        if device.platform not in self._makers:
            raise Unsupported(f"no further client can be made for platform {device.platform}")
        if lacking := missing():
            raise Unsupported(f"this version of JAX lacks {', '.join(lacking)}")
        try:
            client = self._makers[device.platform](device, memory, number)
            (twin,) = (each for each in client.local_devices() if same_hardware(each, device))
            _try_sharing(device, twin)
        except Unsupported:
            raise
        except Exception as error:  # what is private may raise anything in another version
            raise Unsupported(_line(error)) from error
        log.info("%s has a further client, for %.3g %% of its memory at most", device, 100 * memory)
        return client, twin

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            log.warning("%s", line)


def missing() -> list[str]:
    """Private names that further clients need and this version of JAX lacks."""
    return [
        f"{module.__name__}.{name}" for module, names in _NAMES.items() for name in names if not hasattr(module, name)
    ]


def _gpu_client(device: jax.Device, memory: float, number: int) -> Any:
    """A client of one GPU that takes memory as it needs it: the first client, JAX's, has taken its share at once."""
    options = dict(xla_client.generate_pjrt_gpu_plugin_options())
    own = float(options.get("memory_fraction", OWN_MEMORY))  # type: ignore[arg-type]
    if own + number * memory > 1 - LEFT_MEMORY + 1e-9:
        raise Unsupported(
            f"JAX's own client has {own:.3g} of the memory (XLA_CLIENT_MEM_FRACTION), {LEFT_MEMORY:g} stays free: that "
            f"leaves no room for {number} further clients of {memory:g} (dispatch.lane_memory)"
        )
    options.pop("collective_memory_size", None)
    options |= {"visible_devices": [device.local_hardware_id], "preallocate": False, "memory_fraction": memory}
    return xla_client.make_c_api_client("cuda", options)


CLIENTS = Clients({"gpu": _gpu_client})
"""Those of this process."""


def same_hardware(one: jax.Device, other: jax.Device) -> bool:
    """Whether two devices, of one client or of two, are the same piece of hardware."""
    return (one.platform, one.process_index, one.local_hardware_id) == (
        other.platform,
        other.process_index,
        other.local_hardware_id,
    )


def share(array: jax.Array, device: jax.Device) -> jax.Array:
    """The same memory as an array of another client; nothing may be donated from then on.

    Args:
        array: on one device, ready or on its way.
        device: the same hardware, as the other client sees it.

    Raises:
        Unsupported: it is a copy.
        jax.errors.JaxRuntimeError: the type has no equivalent in DLPack, or it is other hardware.
    """
    array.block_until_ready()
    capsule = _jax.buffer_to_dlpack_managed_tensor(array, None)
    shared: jax.Array = _jax.dlpack_managed_tensor_to_buffer(capsule, device, None)
    if array.nbytes and shared.unsafe_buffer_pointer() != array.unsafe_buffer_pointer():
        raise Unsupported(f"{device} does not see another client's memory: JAX made a copy")
    return shared


def bring(array: jax.Array, device: jax.Device) -> jax.Array:
    """An array of one device for another one: itself there, shared on the same hardware, a copy elsewhere.

    Raises:
        Unsupported: see `share`.
        jax.errors.JaxRuntimeError: there is no room for a copy.
    """
    (here,) = array.devices()
    if here == device:
        return array
    return share(array, device) if same_hardware(here, device) else jax.device_put(array, device)


def place(values: np.ndarray, devices: Sequence[jax.Device]) -> dict[jax.Device, jax.Array]:
    """A host array on devices: one copy on each piece of hardware, which all its clients share; ready.

    Args:
        devices: of each piece of hardware, the one of the client that is to hold the copy first.

    Raises:
        jax.errors.JaxRuntimeError: there is no room.
    """
    placed: dict[jax.Device, jax.Array] = {}
    for device in devices:
        holder = next((array for held, array in placed.items() if same_hardware(held, device)), None)
        placed[device] = jax.device_put(values, device) if holder is None else bring(holder, device)
    for array in placed.values():
        array.block_until_ready()
    return placed


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a client had no room."""
    return str(error).startswith("RESOURCE_EXHAUSTED")


def lock_memory(device: jax.Device, address: int, size: int) -> None:
    """Page-lock host memory, so that a device's client copies from it directly.

    Raises:
        Unsupported: this JAX or this platform can't.
        jax.errors.JaxRuntimeError: no more memory can be locked.
    """
    if not (hasattr(device.client, "dma_map") and hasattr(device.client, "dma_unmap")):
        raise Unsupported("this version of JAX lacks Client.dma_map")
    device.client.dma_map(address, size)


def unlock_memory(device: jax.Device, address: int) -> None:
    """Inverse of `lock_memory`, by the same address."""
    device.client.dma_unmap(address)


def _try_sharing(device: jax.Device, twin: jax.Device) -> None:
    values = np.arange(4, dtype=np.int32)
    if not np.array_equal(np.asarray(share(jax.device_put(values, device), twin)), values):
        raise Unsupported(f"{twin} does not see another client's memory")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]
