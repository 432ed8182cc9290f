"""FLAME's table of its kernel engine with our rows: eager PyTorch, plain `jax.jit` and fused kernels, batches of eight.

Compute only, as there: inputs lie on the device. Pairs per second are of batches launched one after another; latencies
of batches that are each waited for, which is also what a request of the batch waits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.baselines.inputs import Inputs, Run
from bench.baselines.runs import jax_runs
from bench.fke.choice import chosen, named
from bench.fke.passes import (
    FUSED,
    Progress,
    apart,
    batch,
    compile_together,
    engine_runs,
    first,
    launches,
    least_bytes,
    useful_flops,
    wait,
)
from bench.fke.roofline import Point
from bench.timing import latencies, side_by_side


class Case(NamedTuple):
    """One of the paper's scenarios; `reach` is its throughput with fused kernels over its first row's."""

    config: str
    requests: int
    history: int
    candidates: int
    reach: float


CASES = [Case("climber_base", 8, 256, 128, 4.7), Case("climber_long", 8, 512, 512, 6.3)]
USUAL = ("eager_dense", "eager_split", "eager_sdpa", "dense_masked", "split_softmax", "cudnn")
"""Baselines that are measured unless others are named. Those of PyTorch that compile take minutes."""
EAGER = "eager"


class Effort(NamedTuple):
    """How long to measure: synchronous calls of each run, and rounds and seconds a round of those in a row."""

    calls: int = 250
    rounds: int = 5
    seconds: float = 0.1


def ablation(
    only: Sequence[str],
    baselines: Sequence[str],
    device: jax.Device,
    progress: Progress,
    effort: Effort = Effort(),  # noqa: B008
) -> dict[str, Any]:
    """Every scenario's rows, with points of the roofline.

    Args:
        only: scenarios whose configurations' names hold one of these; all of them if there are none.
        baselines: names of `baselines.runs` and of `baselines.torch_models`; `USUAL` if there are none.
    """
    cases = chosen(CASES, only, lambda case: case.config)
    inputs = {case: batch(*case[:4]) for case in cases}
    runs = {case: offered(one, baselines or USUAL, device, progress) for case, one in inputs.items()}
    compile_together(run for case in cases for run in runs[case].values())
    results, points = [], []
    for case in cases:
        measured = measure(runs[case], inputs[case], effort, progress)
        results.append(case._asdict() | measured | summary(measured["rows"]))
        points += [point._asdict() for point in _points(case, inputs[case], results[-1])]
    return {"ablation": results, "points": points}


def offered(inputs: Inputs, names: Sequence[str], device: jax.Device, progress: Progress) -> dict[str, Run]:
    """The fused program, the reference, and baselines of these names; PyTorch's where it is installed."""
    baselines = jax_runs(inputs)
    if importlib.util.find_spec("torch") is None:
        progress("torch is not installed: no eager PyTorch, and nothing to compare with")
        names = [name for name in names if name not in USUAL or not name.startswith(EAGER)]
    else:
        from bench.baselines.torch_models import torch_runs

        baselines |= torch_runs(inputs, "cuda" if device.platform == "gpu" else "cpu")
    _, engine = engine_runs(inputs, device)
    return engine | named(baselines, names)


def measure(runs: dict[str, Run], inputs: Inputs, effort: Effort, progress: Progress) -> dict[str, Any]:
    """Throughput and latencies of each run, slowest first, and how far its scores are from the reference's."""
    scores, failed = first(runs, progress)
    ready = launches({name: runs[name] for name in scores})
    pipelined = side_by_side(ready, rounds=effort.rounds, seconds=effort.seconds, wait=wait)
    alone = latencies(ready, effort.calls, wait=wait)
    pairs = len(inputs.regular.request_time) * inputs.regular.candidates
    rows = {
        name: {
            "pairs_per_second": pairs / pipelined[name] * 1e3,
            "ms": pipelined[name],
            "mean_ms": mean(alone[name]),
            "p50_ms": float(np.percentile(alone[name], 50)),
            "p99_ms": float(np.percentile(alone[name], 99)),
            "calls": len(alone[name]),
        }
        for name in sorted(pipelined, key=pipelined.__getitem__, reverse=True)
    }
    return {"rows": rows, "apart": apart(scores), "failed": failed}


def summary(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The paper's three rows among ours, each the fastest of its kind, and the fused one's ratios over the first."""
    kinds = {
        "eager": [name for name in rows if name.startswith(EAGER)],
        "jit": [name for name in rows if not name.startswith((EAGER, "compile", "graph", FUSED))],
    }
    best = {kind: min(names, key=lambda n: rows[n]["ms"]) for kind, names in kinds.items() if names}
    found: dict[str, Any] = {"best": best | {"fused": FUSED}}
    for name, kind in (("ratio", "eager"), ("ratio_over_jit", "jit")):
        found[name] = rows[best[kind]]["ms"] / rows[FUSED]["ms"] if kind in best else None
    found["latency_ratio"] = rows[best["eager"]]["mean_ms"] / rows[FUSED]["mean_ms"] if "eager" in best else None
    return found


def _points(case: Case, inputs: Inputs, result: dict[str, Any]) -> list[Point]:
    flops, least = useful_flops(inputs), least_bytes(inputs)
    return [
        Point(
            f"{case.config} B={case.requests}, {name}",
            "forward",
            name == FUSED,
            flops,
            least,
            result["rows"][name]["ms"],
        )
        for name in result["best"].values()
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table per scenario."""
    return "\n\n".join(map(_table, results))


def _table(result: dict[str, Any]) -> str:
    title = f"{result['config']}, {result['requests']} requests of {result['history']} a block + {result['candidates']}"
    lines = [f"| {title} | pairs/s | mean ms | P99 ms | fused is faster |", "|" + "---|" * 5]
    fused = result["rows"][FUSED]
    for name, row in result["rows"].items():
        bold = "**" if name in result["best"].values() else ""
        numbers = f"{row['pairs_per_second'] / 1e3:.1f}k | {row['mean_ms']:.2f} | {row['p99_ms']:.2f}"
        lines.append(f"| {bold}{name}{bold} | {numbers} | {row['ms'] / fused['ms']:.2f} x |")
    if result["ratio"]:
        told = f"{result['ratio']:.2f} times eager PyTorch's throughput (the paper's ratio: {result['reach']:.1f})"
        lines += ["", f"{told}, {result['latency_ratio']:.2f} times faster by mean latency"]
    return "\n".join(lines)
