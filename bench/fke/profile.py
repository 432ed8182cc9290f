"""What each kernel of a whole forward pass takes on the device, by JAX's profiler.

Profiling launches kernels one by one instead of as a graph, so that the sum of their times counts, not the span.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.fke.choice import chosen
from bench.fke.forward import CASES, Case
from bench.fke.passes import FUSED, batch, compile_together, engine_runs

PASSES = 10
MOSAIC = "mosaic"
"""What names of Pallas' kernels hold."""


def profile(only: Sequence[str], device: jax.Device, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Per case the kernels of the fused program.

    Args:
        only: cases whose names hold one of these; all of them if there are none.
    """
    mine = chosen(cases, only, lambda case: case.name)
    runs = {
        case.name: engine_runs(batch(case.config, case.requests, case.history, case.candidates), device)[1][FUSED]
        for case in mine
    }
    compile_together(runs.values())
    found = []
    for name, run in runs.items():
        run.wait(run.launch())
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(PASSES):
                    last = run.launch()
                run.wait(last)
            (file,) = Path(folder).rglob("*.xplane.pb")
            found.append({"case": name, "kernels": kernels(jax.profiler.ProfileData.from_file(str(file)).planes)})
    return {"profile": found}


def kernels(planes: Iterable[Any]) -> list[dict[str, Any]]:
    """By name, slowest first: calls and microseconds of a pass."""
    seen: dict[str, list[float]] = {}
    for plane in planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                seen.setdefault(event.name, []).append(event.duration_ns / 1e3)
    rows = [{"name": name, "calls": len(us) / PASSES, "us": sum(us) / PASSES} for name, us in seen.items()]
    return sorted(rows, key=lambda row: -row["us"])


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: Pallas' kernels and XLA's, and the slowest of the latter."""
    lines = ["| forward pass | Pallas: kernels, us | XLA: kernels, us | slowest of these |", "|" + "---|" * 4]
    for one in found:
        ours = [row for row in one["kernels"] if MOSAIC in row["name"]]
        others = [row for row in one["kernels"] if MOSAIC not in row["name"]]
        sums = (f"{sum(r['calls'] for r in rows):.0f}, {sum(r['us'] for r in rows):.1f}" for rows in (ours, others))
        slowest = ", ".join(f"{row['name']} {row['us']:.1f}" for row in others[:3])
        lines.append(f"| {one['case']} | {' | '.join(sums)} | {slowest} |")
    return "\n".join(lines)
