"""Times of device programs, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

ROUNDS = 7
ROUND_SECONDS = 0.15

Launch = Callable[[], Any]
"""Starts one run and returns what becomes ready with it, arrays or trees of them."""


def side_by_side(
    runs: Mapping[str, Launch],
    rounds: int = ROUNDS,
    seconds: float = ROUND_SECONDS,
    wait: Callable[[Any], object] = jax.block_until_ready,
) -> dict[str, float]:
    """Median over rounds of milliseconds a call, pipelined; the runs take turns within a round."""
    counts = {name: max(5, int(seconds * 1e3 / max(_milliseconds(run, 5, wait), 1e-3))) for name, run in runs.items()}
    found = [{name: _milliseconds(run, counts[name], wait) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in runs}


def latencies(
    runs: Mapping[str, Launch], calls: int, rounds: int = ROUNDS, wait: Callable[[Any], object] = jax.block_until_ready
) -> dict[str, list[float]]:
    """Milliseconds of each of about so many calls, every one waited for; the runs take turns, round by round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wait(run())
            for _ in range(-(-calls // rounds)):
                started = time.perf_counter()
                wait(run())
                found[name].append((time.perf_counter() - started) * 1e3)
    return found


def _milliseconds(run: Launch, count: int, wait: Callable[[Any], object]) -> float:
    wait(run())
    started = time.perf_counter()
    for _ in range(count):
        last = run()
    wait(last)
    return (time.perf_counter() - started) * 1e3 / count
