"""Measured choices of block sizes: data, `tuned/DEVICE.json`, made by `python -m bench.fke --tune` on that device."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

log = logging.getLogger(__name__)

DEVICE = "h100"
"""What the kernels are tuned for."""

Choice = Mapping[str, int]


def best(operation: str, shape: Mapping[str, Any], rows: int) -> Choice | None:
    """The block sizes measured as the fastest for a kernel of this shape.

    Args:
        shape: what has to be equal.
        rows: token rows of all blocks together; of several measurements the nearest one, by ratio, counts.

    Returns:
        Field of the kernel's `Tiling` -> value; None, told once, when no such shape was measured.
    """
    same = [entry for entry in _entries().get(operation, []) if entry["shape"] == dict(shape)]
    if not same:
        _tell(operation, json.dumps(dict(shape), sort_keys=True))
        return None
    nearest = min(same, key=lambda entry: abs(math.log(entry["rows"] / rows)))
    tiling: Choice = nearest["tiling"]
    return tiling


@cache
def _entries() -> dict[str, list[dict[str, Any]]]:
    file = resources.files(__package__).joinpath("tuned", f"{DEVICE}.json")
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["entries"] if file.is_file() else {}
    return found


@cache
def _tell(operation: str, shape: str) -> None:
    log.warning("%s has no measured block sizes for %s on %s: a guess is taken", operation, shape, DEVICE)
