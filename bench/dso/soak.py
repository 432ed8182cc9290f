"""A long time at 80 % of what the dispatcher can do: does memory grow, does anything stall?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.artifacts import ITEMS
from bench.dso.load import Load
from bench.dso.scale import scale_of
from bench.dso.systems import batching, engine_of
from bench.settled import settled
from flame_jax.dso.lanes import make_lanes

LOAD = 0.8
SETTLE = 3.0
"""Seconds of saturation before each part, to know its load: what a machine can do may change with its neighbours'."""
PART = 30.0
"""Seconds of load after which memory is looked at."""
TICK = 1e-3
"""Seconds that a thread sleeps which looks out for stalls."""
BIN, BINS = 1e-4, 20_000
"""Seconds of a bin of stalls, and how many there are: what is kept does not grow."""


class Stalls:
    """How much later than planned a thread of this process gets its turn: what everybody in it has to wait."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.is_set():
            planned = time.monotonic() + TICK
            time.sleep(TICK)
            self.late.append(time.monotonic() - planned)

    def take(self) -> np.ndarray:
        """Seconds late since the last time."""
        taken, self.late = self.late, []
        return np.array(taken)

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()


def measure(progress: Callable[[str], None], artifacts: Path, *, minutes: float) -> dict[str, Any]:
    """The heavy-tailed mix, our policy, two lanes."""
    device = jax.devices()[0]
    scale = scale_of("heavy", device)
    engine = engine_of(scale.config, scale.buckets, device, artifacts / scale.mix.name)
    system = batching(
        scale.config, [lane.engine for lane in make_lanes(engine, 2, [device], memory=0.05)], "deadline_cost"
    )
    load, stalls = Load(system, scale.mix, ITEMS), Stalls()
    with settled():
        parts, counts, longest = list[dict[str, Any]](), np.zeros(BINS, np.int64), 0.0
        begun = time.monotonic()
        while time.monotonic() < begun + 60 * minutes:
            rate = LOAD * load.closed(scale.inside, SETTLE).answered
            stalls.take()
            point = load.open(rate, PART, seed=len(parts))
            late = stalls.take()
            counts += np.bincount(np.clip(late / BIN, 0, BINS - 1).astype(np.int64), minlength=BINS)
            longest = max(longest, float(late.max()))
            parts.append(
                {
                    "minutes": (time.monotonic() - begun) / 60,
                    "rss_mib": _rss(),
                    "rate": rate,
                    "answered": point.answered,
                    "p99_ms": point.ms["p99"],
                    "outcomes": point.outcomes,
                    "stall_ms": float(late.max() * 1e3),
                }
            )
            progress(f"{parts[-1]}")
    stalls.stop()
    system.stop()
    return {
        "soak": {
            "parts": parts,
            "stall_p999_ms": float((np.searchsorted(counts.cumsum(), 0.999 * counts.sum()) + 1) * BIN * 1e3),
            "stall_max_ms": longest * 1e3,
        }
    }


def _rss() -> float:
    """MiB of memory that this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    found = result["soak"]
    parts: Sequence[Mapping[str, Any]] = found["parts"]
    warm = [part for part in parts if part["minutes"] > 2] or parts
    memory = [part["rss_mib"] for part in warm]
    return (
        f"{parts[-1]['minutes']:.0f} minutes, {np.mean([part['rate'] for part in parts]):.0f} requests/s: memory "
        f"between {min(memory):.1f} and {max(memory):.1f} MiB, at the end {memory[-1] - memory[0]:+.1f}; stalls P99.9 "
        f"{found['stall_p999_ms']:.1f} ms, at most {found['stall_max_ms']:.0f} ms"
    )
