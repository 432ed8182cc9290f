"""FLAME's Table 5, and a heavy-tailed mix: what every way to serve does at most, and how long requests take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bench.artifacts import ITEMS
from bench.dso.busy import gpu_busy
from bench.dso.curves import draw
from bench.dso.load import Load
from bench.dso.plain import Plain
from bench.dso.scale import Scale, scale_of
from bench.dso.systems import System, batching, engine_of
from bench.settled import settled
from flame_jax.dso.lanes import make_lanes
from flame_jax.packing import Bucket

SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Loads of the latency curve, of what the row does at saturation."""
LIMITS_MS = (20.0, 50.0)
STEPS = 5
"""Halvings in the search for the highest load within a latency."""
COMMON = 0.9
"""Load at which all rows' latencies are compared, of what the first row does at saturation."""

Make = Callable[[], System | Plain]


def rows_of(scale: Scale, device: jax.Device, artifacts: Path) -> Iterator[tuple[str, Make]]:
    """The rows of one mix, made one after the other."""
    config, mix = scale.config, scale.mix
    engine = engine_of(config, scale.buckets, device, artifacts / mix.name)
    engines = [lane.engine for lane in make_lanes(engine, max(scale.lanes), [device], memory=0.05)]
    if scale.implicit:
        exact = engine_of(config, mix.exact(config.layout), device, artifacts / f"{mix.name}_implicit")
        yield "a: implicit shape", partial(Plain, config, exact, device, page_locked=False)
    largest = config.layout.aligned_extent(mix.longest)
    bucket = Bucket(sum(largest), largest.candidates)
    single = engine_of(config, [bucket], device, artifacts / f"{mix.name}_padded")
    yield "b: padded to one bucket", partial(Plain, config, single, device, page_locked=True)
    yield f"c: descending, {len(engines)} lanes", partial(batching, config, engines, "descending")
    for count in scale.lanes:
        if count <= len(engines):
            yield f"d: ours, {count} lanes", partial(batching, config, engines[:count], "deadline_cost")


def measure(
    progress: Callable[[str], None],
    artifacts: Path,
    *,
    seconds: float,
    mixes: Sequence[str] | None,
    implicit_shapes: bool = True,
) -> dict[str, Any]:
    """Every row of every mix."""
    device, tables = jax.devices()[0], []
    for name in mixes or ("paper", "heavy"):
        scale, rows = scale_of(name, device), list[dict[str, Any]]()
        scale = replace(scale, implicit=scale.implicit and implicit_shapes)
        common = 0.0
        for row, make in rows_of(scale, device, artifacts):
            found = {"row": row} | _row(make(), scale, common, seconds)
            common = common or COMMON * found["saturated"]["answered"]
            progress(f"{name}, {row}: {found['saturated']['pairs']:,.0f} pairs/s")
            rows.append(found)
            gc.collect()
        tables.append({"mix": name, "rows": rows})
    return {"table": tables}


def _row(system: System | Plain, scale: Scale, common: float, seconds: float) -> dict[str, Any]:
    """One way to serve; `common` is the load at which all are compared, 0 where it is this one's to say."""
    load = Load(system, scale.mix, ITEMS)
    with settled():
        load.closed(scale.inside, seconds / 2)  # the costs settle
        with gpu_busy() as busy:
            most = load.closed(scale.inside, seconds)
        common = common or COMMON * most.answered
        found = {
            "saturated": most._asdict() | {"gpu_busy": busy[0] if busy else None},
            "common": load.open(common, seconds)._asdict() if common < 0.98 * most.answered else None,
            "loads": [load.open(share * most.answered, seconds)._asdict() for share in SHARES],
            "within": {f"{limit:g}": _within(load, limit, most.answered, seconds) for limit in LIMITS_MS},
            "costs_ms": _costs(system),
        }
    system.stop()
    return found


def _costs(system: System | Plain) -> dict[str, list[float]]:
    return {str(bucket): [second * 1e3 for second in seconds] for bucket, seconds in system.costs().items()}


def _within(load: Load, limit: float, most: float, seconds: float) -> float:
    """Requests per second with P99 within so many milliseconds, by halving."""
    low, high = 0.0, most
    for _ in range(STEPS):
        rate = (low + high) / 2
        low, high = (rate, high) if load.open(rate, seconds / 2).ms["p99"] <= limit else (low, rate)
    return low


def table(result: Mapping[str, Any]) -> str:
    """Markdown, one table a mix."""
    lines: list[str] = []
    for one in result["table"]:
        first = one["rows"][0]
        lines += [
            f"**{one['mix']}**, the same load is {COMMON:.0%} of the first row's",
            "",
            "| | pairs/s at most | of the first | same load: mean ms | P99 ms | req/s with P99 <= 20 ms | <= 50 ms | "
            "requests a batch | padding | GPU busy | host us a batch | a request |",
            "|" + "---|" * 12,
        ]
        for row in one["rows"]:
            most, common = row["saturated"], row["common"]
            same = f"{common['ms']['mean']:.2f} | {common['ms']['p99']:.2f}" if common else " | "
            busy = f"{most['gpu_busy']:.0%}" if most["gpu_busy"] is not None else ""
            lines.append(
                f"| {row['row']} | {most['pairs']:,.0f} | {most['pairs'] / first['saturated']['pairs']:.2f}x | {same} "
                f"| {row['within']['20']:,.0f} | {row['within']['50']:,.0f} | {most['requests_per_batch']:.1f} "
                f"| {most['padding']:.0%} | {busy} | {most['host_us_per_batch']:.0f} "
                f"| {most['host_us_per_request']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    """Latency over load, one drawing a mix."""
    drawn = {}
    for one in result["table"]:
        for figure in ("mean", "p99"):
            curves = {row["row"]: [(p["pairs"], p["ms"][figure]) for p in row["loads"]] for row in one["rows"]}
            drawn[f"{one['mix']}_{figure}"] = draw(f"{one['mix']} mix", "pairs/s", f"{figure} latency, ms", curves)
    return drawn
