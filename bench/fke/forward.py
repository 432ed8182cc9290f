"""Whole forward passes, ids to probabilities: fused kernels against what plain JAX gives for the same batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from bench.baselines.inputs import Inputs, Run
from bench.baselines.runs import CLIMBER, HSTU, jax_runs
from bench.fke.choice import chosen, named
from bench.fke.passes import (
    FUSED,
    Progress,
    apart,
    batch,
    compare,
    compile_together,
    configured,
    engine_runs,
    least_bytes,
    useful_flops,
)
from flame_jax.pallas_kernels.kernels import Kernels


class Case(NamedTuple):
    """A batch of equal requests, and how many times as fast as the best baseline the fused kernels are to be."""

    config: str
    requests: int
    history: int
    candidates: int
    reach: float

    @property
    def name(self) -> str:
        """As it is chosen by."""
        return f"{self.config} B={self.requests}"


CASES = [
    Case("climber_base", 1, 256, 128, 2.0),
    Case("climber_base", 32, 256, 128, 2.0),
    Case("climber_long", 1, 512, 512, 2.0),
    Case("climber_long", 32, 512, 512, 2.2),
    Case("hstu_dlrmv3", 1, 1024, 2048, 1.0),
    Case("hstu_dlrmv3", 32, 1024, 2048, 1.0),
]
"""Histories of each block; a reach of 1 where another stack is what counts."""


class _Prepared(NamedTuple):
    """A case before it is timed."""

    case: Case
    inputs: Inputs
    kernels: Kernels
    runs: dict[str, Run]


def forward(
    only: Sequence[str], baselines: Sequence[str], device: jax.Device, progress: Progress, cases: Sequence[Case] = CASES
) -> dict[str, Any]:
    """The table's rows, with points of the roofline.

    Args:
        only: cases whose names hold one of these; all of them if there are none.
        baselines: their names; all that a model has if there are none.
    """
    named(CLIMBER | HSTU, baselines)
    prepared = []
    for case in chosen(cases, only, lambda case: case.name):
        if names := [name for name in _baselines(case) if not baselines or name in baselines]:
            prepared.append(_prepare(case, names, device))
        else:
            progress(f"{case.name}: left out, its model has none of these baselines")
    # All programs before anything is timed: then the device has nothing else to do.
    compile_together(run for p in prepared for run in p.runs.values())
    results = [_measure(p, progress) for p in prepared]
    return {"forward": results, "points": [point for r in results for point in r.pop("points")]}


def _baselines(case: Case) -> Iterable[str]:
    return CLIMBER if configured(case.config).model.architecture == "climber" else HSTU


def _prepare(case: Case, baselines: Sequence[str], device: jax.Device) -> _Prepared:
    inputs = batch(case.config, case.requests, case.history, case.candidates)
    kernels, engine = engine_runs(inputs, device)
    return _Prepared(case, inputs, kernels, engine | named(jax_runs(inputs), baselines))


def _measure(prepared: _Prepared, progress: Progress) -> dict[str, Any]:
    """Milliseconds by implementation, and how far each one's scores are from the reference's."""
    case, inputs, kernels, runs = prepared
    scores, row = compare(case.name, runs, useful_flops(inputs), least_bytes(inputs), progress)
    pairs = case.requests * case.candidates / row["ms"][FUSED] * 1e3
    return case._asdict() | {"kernels": kernels._asdict(), "pairs_per_second": pairs, "apart": apart(scores)} | row


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per case."""
    lines = ["| forward pass | fused ms | best baseline | ratio | reach | pairs/s | useful TFLOP/s |", "|" + "---|" * 7]
    for r in results:
        name = f"{r['config']} B={r['requests']} ({r['history']} a block + {r['candidates']})"
        best = f"{r['best_baseline']} {r['ms'][r['best_baseline']]:.3f} ms"
        numbers = f"{r['ratio']:.2f} | {r['reach']:.2f} | {r['pairs_per_second']:.3g} | {r['useful_tflops']:.0f}"
        lines.append(f"| {name} | {r['ms'][FUSED]:.3f} | {best} | {numbers} |")
    return "\n".join(lines)
