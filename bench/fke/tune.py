"""Which block sizes are fastest on this device, for the shapes that configurations have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.fke.cases import CAUSAL, CLIMBER, HSTU, AttentionCase, following, inputs, layer_weights
from bench.fke.tilings import attention_tilings, layer_tilings
from bench.timing import side_by_side
from flame_jax.pallas_kernels.post_attention import mosaic as post_attention
from flame_jax.pallas_kernels.sumi_attention import mosaic as sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Softmax

CHAIN = 8
"""Calls of a kernel in one program, each on the last one's output: a launch alone takes longer than a small kernel."""
SAME = 0.02
"""Two block sizes add up in another order: their results may differ by this, where values are of size 1."""


class Row(NamedTuple):
    """One shape: microseconds of a call by block sizes, fastest first."""

    operation: str
    name: str
    shape: dict[str, Any]
    rows: int
    microseconds: dict[str, float]
    tiling: dict[str, int]


def tune(progress: Callable[[str], None]) -> list[Row]:
    """Time every tiling of every shape; those that give other results are told and left out."""
    rows = [_attention(case, progress) for case in [*CLIMBER, *HSTU, *CAUSAL]]
    return [*rows, *(_layer(tokens, progress) for tokens in (384, 3072, 12288, 32768))]


def entries(rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """What `tuned/DEVICE.json` holds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.operation, []).append({"shape": row.shape, "rows": row.rows, "tiling": row.tiling})
    return found


def _attention(case: AttentionCase, progress: Callable[[str], None]) -> Row:
    arrays, activation, bias = inputs(case)
    given = [activation.temperature] if isinstance(activation, Softmax) else []
    given += [bias.coefficients] if isinstance(bias, LogBias) else []

    def run(tiling: Any, q: jax.Array, *rest: jax.Array) -> jax.Array:
        k, v, rows, time, *given = rest
        settings: dict[str, Any] = {"activation": activation, "bias": None, "causal": not case.softmax, "align": 64}
        if case.softmax:
            settings |= {"activation": Softmax(given[0]), "bias": LogBias(given[1])}
        for _ in range(CHAIN):
            q = sumi_attention.sumi_attention(q, k, v, rows, time, **settings, tiling=tiling)
        return q

    shape = sumi_attention.tuned_shape(case.heads, case.dim, case.dim, activation, bias, not case.softmax)
    tilings = attention_tilings(case.heads, case.dim, case.dim)
    rows = case.blocks * case.bucket.tokens
    return _fastest("sumi_attention", case.name, shape, rows, tilings, run, [*arrays, *given], progress)


def _layer(tokens: int, progress: Callable[[str], None]) -> Row:
    width, hidden, random = 128, 512, np.random.default_rng(0)
    weights = layer_weights(random)
    names = list(weights)
    attended, x = (jnp.asarray(random.normal(size=(2, tokens, width)), jnp.bfloat16) for _ in range(2))

    def run(tiling: Any, attended: jax.Array, x: jax.Array, *given: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            named = dict(zip(names, given, strict=True))
            x, attended, *_ = post_attention.post_attention(attended, x, named, 0, following(named), tiling=tiling)
        return x + attended

    shape = {"width": width, "inner": width, "hidden": hidden}
    operands = [attended, x, *weights.values()]
    return _fastest("post_attention", f"2 x {tokens} rows", shape, 2 * tokens, layer_tilings(), run, operands, progress)


def _fastest(
    operation: str,
    name: str,
    shape: dict[str, Any],
    rows: int,
    tilings: list[Any],
    run: Callable[..., jax.Array],
    operands: list[jax.Array],
    progress: Callable[[str], None],
) -> Row:
    with ThreadPoolExecutor() as pool:
        programs = pool.map(_compile, (partial(run, tiling) for tiling in tilings), [operands] * len(tilings))
        compiled = dict(zip(map(str, tilings), programs, strict=True))
    launches: dict[str, Callable[[], jax.Array]] = {}
    launches |= {tiling: partial(c, *operands) for tiling, c in compiled.items() if not isinstance(c, str)}
    for tiling, error in compiled.items():
        if isinstance(error, str):
            progress(f"{operation} {name}: {tiling} does not compile: {error}")
    _drop_odd(launches, f"{operation} {name}", progress)
    times = side_by_side(launches, rounds=5, seconds=0.02)
    order = sorted(times, key=lambda tiling: times[tiling])
    microseconds = {tiling: round(times[tiling] * 1e3 / CHAIN, 2) for tiling in order}
    progress(f"{operation} {name}: {next(iter(microseconds.items()))}")
    chosen = next(t for t in tilings if str(t) == order[0])
    return Row(operation, name, shape, rows, microseconds, vars(chosen))


def _compile(function: Callable[..., jax.Array], operands: list[jax.Array]) -> jax.stages.Compiled | str:
    try:
        return jax.jit(function).lower(*operands).compile()
    except Exception as error:  # told, and left out
        return f"{type(error).__name__}: {str(error)[-200:]}"


def _drop_odd(launches: dict[str, Callable[[], jax.Array]], name: str, progress: Callable[[str], None]) -> None:
    results: Mapping[str, np.ndarray] = {t: np.asarray(run(), np.float32) for t, run in launches.items()}
    usual = np.median(np.stack(list(results.values())), axis=0)
    for tiling, result in results.items():
        apart = float(np.abs(result - usual).max()) / max(1.0, float(np.abs(usual).max()))
        if not apart <= SAME:
            progress(f"{name}: {tiling} is {apart:.3g} off and left out")
            del launches[tiling]
