"""More load than there is room for, in process: how much is still answered in time, and how soon the rest is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from bench.artifacts import ITEMS
from bench.dso.load import Load
from bench.dso.scale import scale_of
from bench.dso.systems import System, engine_of
from bench.settled import settled
from flame_jax.dso.calibrate import calibrate
from flame_jax.dso.lanes import make_lanes

TIMES = {1.0: 1.0, 1.2: 0.95, 1.5: 0.95, 2.0: 0.90, 4.0: 0.80, 10.0: 0.70}
"""How many times as much as it can do, and what part of the best is still to be answered in time."""
PATIENCE_BATCHES = 20
"""Deadlines, in times of the largest bucket."""
LANES = 2


def measure(progress: Callable[[str], None], artifacts: Path, *, seconds: float) -> dict[str, Any]:
    """The paper's mix at 1 to 10 times capacity, with the limits that servers have; and after it has gone."""
    device = jax.devices()[0]
    scale = scale_of("paper", device)
    engine = engine_of(scale.config, scale.buckets, device, artifacts / scale.mix.name)
    engines = [lane.engine for lane in make_lanes(engine, LANES, [device], memory=0.05)]
    measured = calibrate(engines)
    patience = max(0.02, PATIENCE_BATCHES * max(measured[max(measured)]))
    dispatch = replace(scale.config.dispatch, target_wait_ms=patience * 1e3 / 4)
    config = replace(scale.config, dispatch=dispatch)
    system = System(config, [(engine, engine.device) for engine in engines], measured)
    load, rows = Load(system, scale.mix, ITEMS), list[dict[str, Any]]()
    with settled():
        capacity = load.closed(min(scale.inside, 200), seconds).answered
        for times in TIMES:
            point = load.open(times * capacity, seconds, patience=patience)
            rows.append({"times": times} | point._asdict())
            progress(f"{times:g} x {capacity:.0f}/s: {point.pairs:,.0f} pairs/s in time, {point.outcomes}")
        recovery = _recovery(load, capacity, patience)
    system.stop()
    return {"overload": {"capacity": capacity, "patience_ms": patience * 1e3, "rows": rows, "recovery_s": recovery}}


def _recovery(load: Load, capacity: float, patience: float) -> float:
    """Seconds after ten times the load until a half of what it can do is answered as ever, all of it."""
    load.open(10 * capacity, 1.0, patience=patience)
    begun = time.monotonic()
    while time.monotonic() < begun + 10:
        before = time.monotonic() - begun
        if load.open(capacity / 2, 0.1, patience=patience).outcomes.keys() == {"ok"}:
            return before
    return float("inf")


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    found = result["overload"]
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    best = max(row["pairs"] for row in rows)
    lines = [
        "| load | handed in, req/s | in time pairs/s | of the best | reach | P99 ms of answers | of refusals | ended |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        times, pairs, p99 = row["times"], row["pairs"], row["ms"]["p99"]
        lines.append(
            f"| {times:g}x | {row['offered']:,.0f} | {pairs:,.0f} | {pairs / best:.0%} | {TIMES[times]:.0%} "
            f"| {p99:.1f} | {row['refused_ms']:.2f} | {row['outcomes']} |"
        )
    return "\n".join(
        [*lines, "", f"deadline {found['patience_ms']:.0f} ms; as before {found['recovery_s']:.2f} s after"]
    )
