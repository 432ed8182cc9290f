"""What every result file says of where it came from."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import timeit
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grpcio")


def describe(command: str, commit: str | None = None) -> dict[str, Any]:
    """Device, host, package versions, commit and command of a run.

    Args:
        commit: of this checkout, for machines that have a copy of it without its history.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "host": {"cores": len(os.sched_getaffinity(0)), "python_loop_ns": _python_loop_ns()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": commit or _commit(),
        "command": command,
    }


def _python_loop_ns() -> float:
    """Of one turn of a loop, the best of five: hosts of the same GPU differ by half in how fast they run Python."""
    turns = 200_000
    return min(timeit.repeat("x += 1", "x = 0", number=turns, repeat=5)) / turns * 1e9


def _commit() -> str:
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
