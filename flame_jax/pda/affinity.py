"""Keeps a process on the processor cores that are near its GPU: memory on another node is farther from both."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import NamedTuple

SYSFS = Path("/sys")
_DRIVER = "libcuda.so.1"
_BUS_ID_LENGTH = 32


class Binding(NamedTuple):
    """Cores to stay on, or None for all there are; and why, for the log."""

    cores: frozenset[int] | None
    reason: str


def parse_cores(text: str) -> frozenset[int]:
    """Cores of a list such as `0-7,16`, as the kernel writes them.

    Raises:
        ValueError: it is none.
    """
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ValueError(f"{text!r} is no list of cores such as 0-7,16")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise ValueError(f"{text!r} counts down")
        cores.update(numbers)
    return frozenset(cores)


def choose(wanted: str, gpu: str | None, sysfs: Path = SYSFS) -> Binding:
    """Where to stay.

    Args:
        wanted: a list of cores; `auto`: those of the GPU's node where there are several nodes; `all`.
        gpu: PCI address of the GPU that is used, or None.

    Raises:
        ValueError: `wanted` is none of these, or names no core that this process may use.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    if wanted == "all":
        return Binding(None, "all cores, as told")
    if wanted != "auto":
        cores = parse_cores(wanted) & allowed
        if not cores:
            raise ValueError(f"server.cores {wanted} names no core that this process may use")
        return Binding(cores, f"cores {_shown(cores)}, as told")
    if gpu is None:
        return Binding(None, "all cores: no GPU is used")
    nodes = _nodes(sysfs)
    if len(nodes) < 2:
        return Binding(None, "all cores: the machine has one NUMA node")
    node = _node_of(gpu, sysfs)
    if node not in nodes or not nodes[node] & allowed:
        return Binding(None, f"all cores: of GPU {gpu} no NUMA node is known that this process may use")
    cores = nodes[node] & allowed
    return Binding(cores, f"cores {_shown(cores)} of NUMA node {node}, where GPU {gpu} is")


def bind(binding: Binding) -> None:
    """Keep every thread that there is, and all that they will start, on these cores."""
    if binding.cores is not None:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), binding.cores)


def first_gpu() -> str | None:
    """PCI address of the first NVIDIA GPU that CUDA_VISIBLE_DEVICES lets through; None where there is none."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    device, address = ctypes.c_int(), ctypes.create_string_buffer(_BUS_ID_LENGTH)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetPCIBusId(address, _BUS_ID_LENGTH, device):
        return None
    return address.value.decode().lower()


def _nodes(sysfs: Path) -> dict[int, frozenset[int]]:
    """Cores of every NUMA node that has some."""
    found = {}
    for folder in sysfs.glob("devices/system/node/node[0-9]*"):
        text = (folder / "cpulist").read_text().strip()
        if text:
            found[int(folder.name.removeprefix("node"))] = parse_cores(text)
    return found


def _node_of(gpu: str, sysfs: Path) -> int:
    """The node that a GPU is attached to; -1 where the machine does not say."""
    try:
        return int((sysfs / "bus/pci/devices" / gpu / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def _shown(cores: frozenset[int]) -> str:
    """As `parse_cores` reads them."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
