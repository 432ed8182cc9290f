"""HSTU's layers alone, token embeddings in and candidates' out: whole, and with the history's keys and values given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.baselines.inputs import Inputs, Run
from bench.baselines.runs import GIVEN, HSTU, given_runs, hstu_tokens, jax_run
from bench.fke.choice import chosen, named
from bench.fke.layers import Layers, Operands, candidates_alone, layers_run, random_history, whole
from bench.fke.passes import FUSED, REFERENCE, Progress, batch, compare, compile_together, useful_flops
from flame_jax.fke.device import kernels_for
from flame_jax.models.cost import request_cost
from flame_jax.pallas_kernels import kernels as implementations
from flame_jax.pallas_kernels.kernels import Kernels


class Case(NamedTuple):
    """A batch of equal requests.

    Attributes:
        given: the history's keys and values are there already, and candidates alone are computed.
        stated_ms: of meta's Triton stack, measured on an H100 with torch 2.11.
        reach_ms: what the fused kernels are to take at most.
    """

    config: str
    requests: int
    history: int
    candidates: int
    given: bool
    stated_ms: float
    reach_ms: float

    @property
    def name(self) -> str:
        """As it is chosen by."""
        given = ", history K/V given" if self.given else ""
        return f"{self.config} stack B={self.requests}, {self.history}+{self.candidates}{given}"


CASES = [
    Case("hstu_dlrmv3", 32, 1024, 2048, given=False, stated_ms=8.61, reach_ms=5.2),
    Case("hstu_dlrmv3", 32, 1024, 2048, given=True, stated_ms=20.7, reach_ms=3.8),
]


class _Prepared(NamedTuple):
    """A case before it is timed; useful FLOPs, and bytes that have to move."""

    case: Case
    kernels: Kernels
    runs: dict[str, Run]
    flops: int
    bytes: int


def stack(
    only: Sequence[str], baselines: Sequence[str], device: jax.Device, progress: Progress, cases: Sequence[Case] = CASES
) -> dict[str, Any]:
    """The table's rows, with points of the roofline; arguments as those of `forward.forward`."""
    named(HSTU | GIVEN, baselines)
    prepared = []
    for case in chosen(cases, only, lambda case: case.name):
        if names := [name for name in (GIVEN if case.given else HSTU) if not baselines or name in baselines]:
            prepared.append(_prepare(case, names, device))
        else:
            progress(f"{case.name}: left out, it has none of these baselines")
    # All programs before anything is timed: then the device has nothing else to do.
    compile_together(run for p in prepared for run in p.runs.values())
    results = [_measure(p, progress) for p in prepared]
    return {"stack": results, "points": [point for r in results for point in r.pop("points")]}


def _prepare(case: Case, baselines: Sequence[str], device: jax.Device) -> _Prepared:
    inputs = batch(case.config, case.requests, case.history, case.candidates)
    model, layout = inputs.config.model, inputs.config.layout
    kernels = kernels_for(device, model, layout)
    if case.given:
        history, start = random_history(inputs), 0
        operands = candidates_alone(inputs, history)
        plain = given_runs(inputs, hstu_tokens(inputs)[:, case.history :], history, baselines)
    else:
        operands, start = whole(inputs)
        plain = {name: jax_run(inputs, HSTU[name], "stack") for name in baselines}
    runs = {
        name: layers_run(Layers(model, layout.align, layout.aligned(case.history), start, chosen), operands, inputs)
        for name, chosen in ((FUSED, kernels), (REFERENCE, implementations.REFERENCE))
    }
    flops = given_flops(inputs) if case.given else useful_flops(inputs)
    return _Prepared(case, kernels, runs | plain, flops, least_bytes(case, inputs, operands))


def given_flops(inputs: Inputs) -> int:
    """Useful ones of candidates alone: their rows, and the pairs with their history and with themselves."""
    config, schema, regular = inputs.config.model, inputs.config.schema, inputs.regular
    every = request_cost(config, schema, regular.history, regular.candidates)
    history = request_cost(config, schema, regular.history, 0)
    return len(regular.request_time) * (every.layers - history.layers)


def least_bytes(case: Case, inputs: Inputs, operands: Operands) -> int:
    """Weights, the rows that come in and those that go out, and keys and values that are given."""
    model, (x, weights, *_) = inputs.config.model, operands
    history = request_cost(model, inputs.config.schema, case.history, case.candidates).history_bytes
    row = int(x[0, 0].nbytes)
    each = 2 * case.candidates * row + (history if case.given else case.history * row)
    return sum(int(w.nbytes) for w in weights.values()) + case.requests * each


def _measure(prepared: _Prepared, progress: Progress) -> dict[str, Any]:
    """Milliseconds by implementation, and how far each one's rows are from the reference's."""
    case = prepared.case
    rows, row = compare(case.name, prepared.runs, prepared.flops, prepared.bytes, progress)
    return {
        "case": case.name,
        **case._asdict(),
        "kernels": prepared.kernels._asdict(),
        "stated_ratio": case.stated_ms / row["ms"][FUSED],
        "apart": {name: apart(found, rows[REFERENCE]) for name, found in rows.items()},
        **row,
    }


def apart(rows: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference, in units of the reference's spread."""
    return float(np.sqrt(np.mean((rows - reference) ** 2)) / reference.std())


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per case."""
    columns = "fused ms | reach ms | best baseline | ratio | meta's Triton ms | ratio | useful TFLOP/s"
    lines = [f"| layers alone | {columns} |", "|" + "---|" * 8]
    for r in results:
        best = f"{r['best_baseline']} {r['ms'][r['best_baseline']]:.3f} ms"
        stated = f"{r['stated_ms']:.2f} | {r['stated_ratio']:.2f}"
        numbers = f"{r['ms'][FUSED]:.3f} | {r['reach_ms']:.2f} | {best} | {r['ratio']:.2f} | {stated}"
        lines.append(f"| {r['case']} | {numbers} | {r['useful_tflops']:.0f} |")
    return "\n".join(lines)
