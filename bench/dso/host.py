"""Processor time of dispatching: all of it is real but lanes, which take an H100's time and compute nothing."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from bench.artifacts import ITEMS
from bench.dso.load import Load, Point
from bench.dso.simulate import LAYOUT, PAPER, SLOWER, measured
from bench.dso.systems import emulated
from bench.dso.traffic import Mix, paper
from bench.settled import settled
from flame_jax.commandline import load
from flame_jax.config import Config

LOADS = (0.5, 0.9)
INTERVALS = (5e-3, 1e-3, 5e-4, 1e-4)
"""Seconds after which Python's lock goes to a thread that waits for it; the first is Python's own choice."""
ROUNDS, RATE = 5, 2000.0
"""In which the intervals take turns, at so many requests per second on two lanes."""


def measure(progress: Callable[[str], None], *, seconds: float) -> dict[str, Any]:
    """The paper's mix in full size on 1, 2 and 4 lanes: at saturation, and at parts of it."""
    config = replace(load(["--config", "configs/climber_long.yaml"], prog="bench.dso"), layout=LAYOUT)
    mix, rows = paper(len(config.schema.blocks)), list[dict[str, Any]]()
    for lanes in SLOWER:
        system = emulated(config, measured(PAPER, lanes), lanes, jax.devices("cpu")[0])
        sends = Load(system, mix, ITEMS)
        with settled():
            most = sends.closed(512, seconds)
            rows.append({"lanes": lanes, "load": "most"} | most._asdict())
            for share in LOADS:
                rows.append({"lanes": lanes, "load": share} | sends.open(share * most.answered, seconds)._asdict())
        system.stop()
        progress(f"{lanes} lanes: {most.host_us_per_batch:.0f} us a batch of {most.requests_per_batch:.1f} requests")
    return {"loads": rows, "switch_intervals": _intervals(config, mix, seconds / 2)}


def _intervals(config: Config, mix: Mix, seconds: float) -> list[dict[str, float]]:
    """Latency by the interpreter's switch interval: medians of rounds in which they take turns."""
    system = emulated(config, measured(PAPER, 2), 2, jax.devices("cpu")[0])
    sends = Load(system, mix, ITEMS)
    found: dict[float, list[Point]] = {interval: [] for interval in INTERVALS}
    with settled():
        for number in range(ROUNDS):
            for interval in INTERVALS:
                sys.setswitchinterval(interval)
                found[interval].append(sends.open(RATE, seconds, seed=number))
    system.stop()
    return [
        {"seconds": interval}
        | {f"{name}_ms": statistics.median(p.ms[name] for p in points) for name in ("mean", "p99", "p99.9")}
        for interval, points in found.items()
    ]


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    rows: Sequence[Mapping[str, Any]] = result["loads"]
    lines = [
        "| lanes | load | requests/s | requests a batch | us a batch | us a request to hand in | mean ms | P99 ms |"
    ]
    lines.append("|" + "---|" * 8)
    lines += [
        f"| {r['lanes']} | {r['load']} | {r['answered']:,.0f} | {r['requests_per_batch']:.1f} "
        f"| {r['host_us_per_batch']:.0f} | {r['host_us_per_request']:.1f} | {r['ms']['mean']:.2f} "
        f"| {r['ms']['p99']:.2f} |"
        for r in rows
    ]
    lines += ["", "| switch interval ms | mean ms | P99 ms | P99.9 ms |", "|" + "---|" * 4]
    lines += [
        f"| {row['seconds'] * 1e3:g} | {row['mean_ms']:.2f} | {row['p99_ms']:.2f} | {row['p99.9_ms']:.2f} |"
        for row in result["switch_intervals"]
    ]
    return "\n".join(lines)
