"""The policies in the simulator, with an H100's measured batch times: no GPU is needed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.dso.curves import draw
from bench.dso.traffic import Mix, heavy, paper
from flame_jax.config import DispatchConfig
from flame_jax.dso.costs import CostModel
from flame_jax.dso.simulator import Report, Simulator
from flame_jax.dso.start import make_scheduler
from flame_jax.packing import Bucket, Layout

FORWARD = Path("bench/results/fke_h100/forward.json")
"""Where milliseconds of whole batches of climber_long come from."""
TO_AND_FRO = 120e-6
"""Seconds that a slot takes to the device and its scores back (docs/pda.md's reach)."""
HOST = 150e-6
"""Seconds of the dispatching thread for a batch: the reach."""
SLOWER = {1: (1.0, 1.0), 2: (1.25, 1.56), 4: (1.68, 2.96)}
"""By busy lanes of one GPU, how many times as long a batch takes there: of the smallest bucket, of the largest.
From pairs/s measured with plain JAX kernels at B = 1 and B = 32 on one, two and four clients of an H100."""
LAYOUT = Layout(align=64, max_requests=32)
PAPER = ((640, 128), (768, 256), (1024, 512), (1536, 1024), (3072, 2048), (6144, 4096), (12288, 8192), (24576, 16384))
HEAVY = ((256, 128), (640, 256), (1024, 512), (2048, 1024), (4096, 2048), (8192, 4096), (16384, 8192), (32768, 16384))
LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
SECONDS, MOST = 1.0, 8000
"""Of simulated load, and requests of it."""


def measured(buckets: Sequence[tuple[int, int]], lanes: int) -> dict[Bucket, list[float]]:
    """Seconds by bucket and busy lanes: straight lines through what was measured at one request and at 32."""
    rows = [row for row in json.loads(FORWARD.read_text())["forward"] if row["config"] == "climber_long"]
    tokens = [row["requests"] * (row["history"] + row["candidates"]) for row in rows]
    seconds = [row["ms"]["fused"] / 1e3 for row in rows]
    slope = (seconds[1] - seconds[0]) / (tokens[1] - tokens[0])
    ladder = sorted(Bucket(*bucket) for bucket in buckets)
    found = {}
    for bucket in ladder:
        alone = max(seconds[0] / 2, seconds[0] + slope * (bucket.tokens - tokens[0]))
        large = (bucket.tokens - ladder[0].tokens) / (ladder[-1].tokens - ladder[0].tokens)
        factors = [np.interp(busy, [*SLOWER], [(1 - large) * a + large * b for a, b in SLOWER.values()]) for busy in
                   range(1, lanes + 1)]  # fmt: skip
        found[bucket] = [alone * float(factor) + TO_AND_FRO for factor in factors]
    return found


def run(policy: str, lanes: int, mix: Mix, buckets: Sequence[tuple[int, int]], rate: float, patience: float) -> Report:
    """One load on one policy."""
    costs = measured(buckets, lanes)
    any_config: dict[str, Any] = {"policy": policy, "max_queue": 100_000, "target_wait_ms": 1e6}
    scheduler = make_scheduler(DispatchConfig(**any_config), LAYOUT, costs, shares=[1.0], lanes=lanes)
    seconds = min(SECONDS, MOST / rate)
    return Simulator(scheduler, CostModel(costs), host=HOST).run(mix.arrivals(rate, seconds, patience=patience))


def saturated(policy: str, lanes: int, mix: Mix, buckets: Sequence[tuple[int, int]]) -> float:
    """Requests per second when there are always more."""
    report = run(policy, lanes, mix, buckets, 1e6, 1e9)
    return len(report.answered()) / report.seconds


def simulate(progress: Callable[[str], None]) -> dict[str, Any]:
    """Both mixes, both policies, one, two and four lanes: throughput, and latency over load."""
    rows = []
    for mix, buckets in ((paper(2), PAPER), (heavy(2), HEAVY)):
        for policy in ("descending", "deadline_cost"):
            for lanes in SLOWER:
                begun, most = time.monotonic(), saturated(policy, lanes, mix, buckets)
                loads = [_load(run(policy, lanes, mix, buckets, share * most, 1e9), lanes) for share in LOADS]
                rows.append(
                    {"mix": mix.name, "policy": policy, "lanes": lanes, "requests_per_second": most,
                     "pairs_per_second": most * mix.mean_candidates, "loads": loads}
                )  # fmt: skip
                progress(f"{mix.name}, {policy}, {lanes} lanes: {most:.0f}/s ({time.monotonic() - begun:.0f} s)")
    return {"simulate": rows, "costs": {str(b): s for b, s in measured(PAPER, 4).items()}}


def _load(report: Report, lanes: int) -> dict[str, float]:
    return {
        "requests_per_second": len(report.ended) / report.seconds,
        "pairs_per_second": report.pairs_per_second(),
        "mean_ms": report.mean_latency() * 1e3,
        "p99_ms": report.latency(99) * 1e3,
        "padding": report.padding(),
        "occupancy": report.occupancy(lanes),
        "requests_per_batch": float(np.mean([ran.requests for ran in report.ran])),
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| mix | policy | lanes | pairs/s at most | at 90 %: mean ms | P99 ms | requests a batch | padding |"]
    lines.append("|" + "---|" * 8)
    for row in result["simulate"]:
        load = row["loads"][LOADS.index(0.9)]
        lines.append(
            f"| {row['mix']} | {row['policy']} | {row['lanes']} | {row['pairs_per_second']:,.0f} "
            f"| {load['mean_ms']:.2f} | {load['p99_ms']:.2f} | {load['requests_per_batch']:.1f} "
            f"| {load['padding']:.0%} |"
        )
    return "\n".join(lines)


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    """One drawing a mix."""
    drawn = {}
    for mix in ("paper", "heavy"):
        curves = {
            f"{row['policy']}, {row['lanes']} lanes": [(p["pairs_per_second"], p["mean_ms"]) for p in row["loads"]]
            for row in result["simulate"]
            if row["mix"] == mix
        }
        title = f"Simulated on an H100's batch times: {mix} mix"
        drawn[f"simulate_{mix}"] = draw(title, "pairs/s", "mean latency, ms", curves)
    return drawn
