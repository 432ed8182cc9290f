"""What every result file says of where it came from."""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grpcio")


def describe(command: str, commit: str | None = None) -> dict[str, Any]:
    """Device, package versions, commit and command of a run.

    Args:
        commit: of this checkout, for machines that have a copy of it without its history.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": commit or _commit(),
        "command": command,
    }


def _commit() -> str:
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
