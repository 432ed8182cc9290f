"""Forward passes, whatever they are made with: compiled together, run once, and what their scores and costs are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from bench.artifacts import untrained
from bench.baselines.inputs import Inputs, Run, make_inputs, packed_run
from bench.fke.roofline import Point
from bench.threads import together, told
from bench.timing import Launch, side_by_side
from flame_jax.commandline import load
from flame_jax.config import Config
from flame_jax.fke.device import kernels_for
from flame_jax.fke.golden import Golden
from flame_jax.models.cost import request_cost
from flame_jax.models.serving import served_weights
from flame_jax.pallas_kernels.kernels import Kernels

FUSED, REFERENCE = "fused", "reference"
Progress = Callable[[str], None]


@cache
def configured(name: str) -> Config:
    """One of `configs/`."""
    return load(["--config", f"configs/{name}.yaml"], prog="bench.fke")


@cache
def _weights(name: str) -> Mapping[str, np.ndarray]:
    return untrained(configured(name)).weights


def batch(config: str, requests: int, history: int, candidates: int) -> Inputs:
    """A batch for a configuration with random weights, the same in every batch."""
    return make_inputs(configured(config), requests, history, candidates, weights=_weights(config))


def engine_runs(inputs: Inputs, device: jax.Device) -> tuple[Kernels, dict[str, Run]]:
    """The kernels that an export for this device chooses; the engine's program with them, and with none."""
    config = inputs.config
    kernels = kernels_for(device, config.model, config.layout)
    return kernels, {FUSED: packed_run(inputs, kernels), REFERENCE: packed_run(inputs)}


def compile_together(runs: Iterable[Run]) -> None:
    """Compile all that can be compiled ahead. What fails here, beside others, is tried again when launched."""
    together({number: run.compile for number, run in enumerate(runs)})


def first(runs: Mapping[str, Run], progress: Progress) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Scores of each, run once; and what fails, in words, told as well.

    Raises:
        RuntimeError: the fused program or the reference is among what fails.
    """
    scores, failed = {}, {}
    for name, run in runs.items():
        try:
            scores[name] = run.scores(run.wait(run.launch()))
        except Exception as error:
            failed[name] = told(error)
            progress(f"{name} failed: {failed[name]}")
    if missing := {FUSED, REFERENCE} - scores.keys():
        raise RuntimeError(f"nothing to compare: {', '.join(f'{name}: {failed[name]}' for name in sorted(missing))}")
    return scores, failed


def launches(runs: Mapping[str, Run]) -> dict[str, Launch]:
    """For timing with `wait`: each library waits in its own way."""

    def launch(run: Run) -> tuple[Run, Any]:
        return run, run.launch()

    return {name: partial(launch, run) for name, run in runs.items()}


def wait(launched: tuple[Run, Any]) -> None:
    """Until what one of `launches` gave is there."""
    run, output = launched
    run.wait(output)


def compare(
    name: str, runs: Mapping[str, Run], flops: int, least: int, progress: Progress
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Scores of each run, and what a row says of their times.

    Args:
        name: of the case, for the roofline's points.
        flops: useful ones.
        least: bytes that have to move.
    """
    scores, failed = first(runs, progress)
    milliseconds = side_by_side(launches({one: runs[one] for one in scores}), rounds=5, seconds=0.1, wait=wait)
    fused = milliseconds[FUSED]
    best = min((one for one in milliseconds if one not in (FUSED, REFERENCE)), key=milliseconds.__getitem__)
    progress(f"{name}: {fused:.3f} ms, {milliseconds[best] / fused:.2f} x {best}")
    return scores, {
        "ms": milliseconds,
        "best_baseline": best,
        "ratio": milliseconds[best] / fused,
        "useful_tflops": flops / fused / 1e9,
        "failed": failed,
        "points": [
            Point(f"{name}, {one}", "forward", one == FUSED, flops, least, milliseconds[one])._asdict()
            for one in (FUSED, best)
        ],
    }


def apart(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Distance to the reference's scores, in units of how far its logits spread (see `Golden.apart`)."""
    golden = Golden([], [scores[REFERENCE].reshape(-1, scores[REFERENCE].shape[-1])])
    return {name: golden.apart(s.reshape(golden.scores[0].shape), golden.scores[0]) for name, s in scores.items()}


def useful_flops(inputs: Inputs) -> int:
    """Of the layers."""
    regular, config = inputs.regular, inputs.config
    one = request_cost(config.model, config.schema, regular.history, regular.candidates)
    return len(regular.request_time) * one.layers


def least_bytes(inputs: Inputs) -> int:
    """What a forward pass has to move: weights once (of the item table the rows asked for), the slot and the scores."""
    regular, schema = inputs.regular, inputs.config.schema
    served = served_weights(inputs.config.model, inputs.weights)
    weights = sum(int(w.nbytes) for name, w in served.items() if name not in ("item", "item_bias"))
    candidates = len(regular.request_time) * regular.candidates
    rows = regular.items.size * int(served["item"][0].nbytes) + candidates * int(served["item_bias"][0].nbytes)
    return weights + rows + inputs.words.nbytes + 4 * candidates * len(schema.tasks)
