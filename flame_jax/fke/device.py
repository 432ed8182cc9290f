"""Devices to compile for: those of this machine, and those that are described by data."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import platform
from functools import cache
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import topologies

from flame_jax.config import ModelConfig
from flame_jax.fke.target import Target
from flame_jax.models.kernel_choice import choose_kernels
from flame_jax.packing import Layout
from flame_jax.pallas_kernels.kernels import Kernels

_DESCRIPTIONS = importlib.resources.files("flame_jax.fke") / "devices"


class UnknownDevice(ValueError):
    """No description of such a device, or nothing to compile for it with; the message says which there are."""


def target_of(device: jax.Device) -> Target:
    """The target that compiling for `device` in this process gives."""
    name = platform_of(device)
    return Target(
        platform=name,
        device_kind=str(device.device_kind),
        compute_capability=str(getattr(device, "compute_capability", "")),
        jaxlib=importlib.metadata.version("jaxlib"),
        plugin=_plugin(name),
        cpu_features=cpu_features() if name == "cpu" else (),
    )


def multiprocessors(device: jax.Device) -> int:
    """Of a GPU; 0 elsewhere."""
    return int(getattr(device, "core_count", 0))


def kernels_for(
    device: jax.Device, model: ModelConfig, layout: Layout, wanted: Literal["auto", "xla", "mosaic"] = "auto"
) -> Kernels:
    """`choose_kernels` for this device."""
    capability = target_of(device).compute_capability
    return choose_kernels(model, layout, capability, wanted, multiprocessors=multiprocessors(device))


def platform_of(device: jax.Device) -> str:
    """`cuda` or `rocm` for a GPU of that make, else JAX's own name (`cpu`, `tpu`)."""
    if device.platform != "gpu":
        return str(device.platform)
    # A device that is only described has a client without a version; descriptions are of CUDA devices.
    version = str(getattr(device.client, "platform_version", "cuda"))
    return "rocm" if "rocm" in version.lower() else "cuda"


@cache
def cpu_features() -> tuple[str, ...]:
    """This machine's architecture and the flags of its CPU, sorted.

    All of them: which ones XLA's code generator makes use of is not told, and its loader takes code that the CPU can't
    run.
    """
    found = {platform.machine()}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            found |= set(value.split())
            break
    return tuple(sorted(found))


def _plugin(platform_name: str) -> str:
    if platform_name != "cuda":
        return ""
    for name in ("jax-cuda13-pjrt", "jax-cuda12-pjrt"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def described_devices() -> list[str]:
    """Names of the devices that can be compiled for without having one."""
    return sorted(f.name.removesuffix(".txtpb") for f in _DESCRIPTIONS.iterdir() if f.name.endswith(".txtpb"))


def described_device(name: str) -> jax.Device:
    """A CUDA device to compile for that this machine need not have.

    Its description, XLA's `GpuTargetConfig` read off a real one, lies in `devices/NAME.txtpb`.

    Raises:
        UnknownDevice: there is no description of that name, or the CUDA plugin is not installed.
    """
    if name not in described_devices():
        raise UnknownDevice(f"no description of a device {name!r}: there is {', '.join(described_devices())}")
    if not _plugin("cuda"):
        raise UnknownDevice(
            "compiling for a CUDA device needs its plugin: pip install --no-deps "
            "jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0}".format(importlib.metadata.version("jaxlib"))
        )
    if not jax.config.jax_platforms:
        # Otherwise the plugin looks for the CUDA libraries, which compiling does without.
        jax.config.update("jax_platforms", "cpu")
    text = (_DESCRIPTIONS / f"{name}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    except (RuntimeError, ValueError) as error:
        raise UnknownDevice(f"the CUDA plugin can't compile for {name} ({error}); is JAX_PLATFORMS=cpu set?") from error
    device: jax.Device = topology.devices[0]
    return device
