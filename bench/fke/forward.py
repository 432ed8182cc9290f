"""Whole forward passes, ids to probabilities: fused kernels against what plain JAX gives for the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.baselines.inputs import Run, make_inputs, packed_run
from bench.baselines.runs import jax_runs
from bench.timing import side_by_side
from flame_jax.commandline import load
from flame_jax.fke.device import target_of
from flame_jax.fke.golden import Golden
from flame_jax.models.cost import request_cost
from flame_jax.models.kernel_choice import choose_kernels

FUSED = "fused"


class Case(NamedTuple):
    """A batch of equal requests, and how many times as fast as the best baseline the fused kernels are to be."""

    config: str
    requests: int
    history: int
    candidates: int
    reach: float


CASES = [
    Case("climber_base", 1, 256, 128, 2.0),
    Case("climber_base", 32, 256, 128, 2.0),
    Case("climber_long", 1, 512, 512, 2.0),
    Case("climber_long", 32, 512, 512, 2.2),
    Case("hstu_dlrmv3", 1, 1024, 2048, 1.0),
    Case("hstu_dlrmv3", 32, 1024, 2048, 1.0),
]
"""Histories of each block; a reach of 1 where another stack is what counts."""


def forward(case: Case, device: Any, progress: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds of a forward pass by implementation, and how far each one's scores are from the reference's."""
    config = load(["--config", f"configs/{case.config}.yaml"], prog="bench.fke")
    inputs = make_inputs(config, case.requests, case.history, case.candidates)
    kernels = choose_kernels(config.model, config.layout, target_of(device).compute_capability, "auto")
    runs = {FUSED: packed_run(inputs, kernels), "reference": packed_run(inputs), **jax_runs(inputs)}
    scores, failed = _first(runs, progress)
    runs = {name: run for name, run in runs.items() if name in scores}
    milliseconds = side_by_side({name: run.launch for name, run in runs.items()})
    others = {n: ms for n, ms in milliseconds.items() if n not in (FUSED, "reference")}
    best = min(others, key=lambda n: others[n])
    flops = case.requests * request_cost(config.model, config.schema, case.history, case.candidates).layers
    pairs = case.requests * case.candidates
    result = {
        **case._asdict(),
        "kernels": kernels._asdict(),
        "ms": milliseconds,
        "best_baseline": best,
        "ratio": others[best] / milliseconds[FUSED],
        "pairs_per_second": pairs / milliseconds[FUSED] * 1e3,
        "useful_tflops": flops / milliseconds[FUSED] / 1e9,
        "apart": _apart(scores),
        "failed": failed,
    }
    progress(f"{case.config} B={case.requests}: {milliseconds[FUSED]:.3f} ms, {result['ratio']:.2f} x {best}")
    return result


def _first(runs: dict[str, Run], progress: Callable[[str], None]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Compile and run each once: scores, and what failed."""
    scores, failed = {}, {}
    for name, run in runs.items():
        try:
            scores[name] = run.scores(run.wait(run.launch()))
        except Exception as error:
            if name == FUSED:
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            progress(f"{name} failed: {failed[name]}")
    return scores, failed


def _apart(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Distance to the reference's scores, in units of how far its logits spread (see `Golden.apart`)."""
    golden = Golden([], [scores["reference"].reshape(-1, scores["reference"].shape[-1])])
    return {name: golden.apart(s.reshape(golden.scores[0].shape), golden.scores[0]) for name, s in scores.items()}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per case."""
    lines = ["| forward pass | fused ms | best baseline | ratio | reach | pairs/s | useful TFLOP/s |", "|" + "---|" * 7]
    for r in results:
        name = f"{r['config']} B={r['requests']} ({r['history']} a block + {r['candidates']})"
        best = f"{r['best_baseline']} {r['ms'][r['best_baseline']]:.3f} ms"
        numbers = f"{r['ratio']:.2f} | {r['reach']:.2f} | {r['pairs_per_second']:.3g} | {r['useful_tflops']:.0f}"
        lines.append(f"| {name} | {r['ms'][FUSED]:.3f} | {best} | {numbers} |")
    return "\n".join(lines)
