"""Which block sizes are fastest on this device, for the shapes that configurations have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.fke import pages
from bench.fke.cases import CAUSAL, CLIMBER, HSTU, AttentionCase, following, hstu_weights, inputs, layer_weights
from bench.fke.choice import chosen
from bench.fke.programs import CHAIN
from bench.fke.tilings import attention_tilings, input_tilings, layer_tilings, output_tilings
from bench.threads import lowering_processes, together
from bench.timing import Launch, side_by_side
from flame_jax.packing import CANDIDATE_COUNT, CANDIDATE_START, HISTORY_START
from flame_jax.pallas_kernels.gated_output import mosaic as gated_output
from flame_jax.pallas_kernels.post_attention import mosaic as post_attention
from flame_jax.pallas_kernels.pre_attention import mosaic as pre_attention
from flame_jax.pallas_kernels.sumi_attention import mosaic as sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Pages, Softmax

BETWEEN = ("climber_long B=8",)
"""Cases whose rows lie between those of others of the same shape: the block sizes of the nearest do."""
SMALL = 32768
"""Rows of all blocks together, up to which a chain takes about as long as starting it."""
SAME = 0.02
"""Two block sizes add up in another order: their results may differ by this, where values are of size 1."""
HSTU_ROWS = (3072, 98304)
"""Of one request and of 32."""
FINALISTS = 3
"""Block sizes of a shape that are timed for longer, after a short run of all of them."""
ATTENTIONS = [case for case in [*CLIMBER, *HSTU, *CAUSAL] if case.name not in BETWEEN]


class Shape(NamedTuple):
    """What is tuned: `run(tiling, *operands)` is `CHAIN` calls, and gives what the first operand may be next.

    The rest is as in `Row`.
    """

    operation: str
    name: str
    shape: dict[str, Any]
    rows: int
    tilings: list[Any]
    run: Callable[..., jax.Array]
    operands: list[jax.Array]

    @property
    def repeats(self) -> int:
        """Chains in a program: starting it takes the host as long as a chain of small kernels takes the device."""
        return 8 if self.rows <= SMALL else 1

    def program(self, tiling: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """`repeats` chains of calls: what the first one gives, to compare, and the last one.

        Long chains are no test: a bit that differs by rounding grows from call to call.
        """

        def repeated(first: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            once = self.run(tiling, first, *rest)
            return once, lax.fori_loop(1, self.repeats, lambda _, x: self.run(tiling, x, *rest), once)

        return repeated


class Row(NamedTuple):
    """One shape: microseconds of a call by block sizes, fastest first."""

    operation: str
    name: str
    shape: dict[str, Any]
    rows: int
    microseconds: dict[str, float]
    tiling: dict[str, int]


class Place(NamedTuple):
    """A program: shape `number` of `OPERATIONS[operation]` and one of its tilings."""

    operation: str
    number: int
    tiling: int


def tune(progress: Callable[[str], None], only: Sequence[str] = (), lowering: Executor | None = None) -> list[Row]:
    """Time every tiling of every shape; those that give other results are told and left out.

    Args:
        only: operations whose names hold one of these; all of them if there are none.
        lowering: where programs are lowered, in place of a process per core.
    """
    operations = chosen(OPERATIONS, only, str)
    makers = {(name, n): make for name in operations for n, make in enumerate(OPERATIONS[name])}
    # Pallas lowers in Python, a second or two for each kernel: threads would wait for each other.
    with lowering or lowering_processes() as pool:
        shapes, failed = together(makers)
        if failed:
            raise RuntimeError("; ".join(failed.values()))
        places = [Place(*key, tiling) for key, shape in shapes.items() for tiling in range(len(shape.tilings))]
        launches, errors = together({p: partial(_compile, pool, p, shapes[p[:2]].operands) for p in places})
    for place, error in errors.items():
        shape = shapes[place[:2]]
        progress(f"{shape.operation} {shape.name}: {shape.tilings[place.tiling]} does not compile: {error}")
    rows = []
    for key, shape in shapes.items():
        mine = {str(shape.tilings[place.tiling]): run for place, run in launches.items() if place[:2] == key}
        rows += [_fastest(shape, mine, progress)] if mine else []
    return rows


def entries(rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """What `tuned/DEVICE.json` holds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.operation, []).append({"shape": row.shape, "rows": row.rows, "tiling": row.tiling})
    return found


def _attention(case: AttentionCase) -> Shape:
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
    tilings = attention_tilings(case.heads, case.dim, case.dim, biased=bias is not None)
    rows = case.blocks * case.bucket.tokens
    return Shape("sumi_attention", case.name, shape, rows, tilings, run, [*arrays, *given])


def _layer(tokens: int) -> Shape:
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
    return Shape("post_attention", f"2 x {tokens} rows", shape, 2 * tokens, layer_tilings(), run, operands)


def _before(tokens: int) -> Shape:
    width, random = 512, np.random.default_rng(0)
    weights, sizes = hstu_weights(random), (width,) * 4
    names = [name for name in weights if not name.startswith("out")]
    x = jax.random.normal(jax.random.key(0), (1, tokens, width), jnp.bfloat16)

    def run(tiling: Any, x: jax.Array, *given: jax.Array) -> jax.Array:
        stack = dict(zip(names, given, strict=True))
        for _ in range(CHAIN):
            x, *_ = pre_attention.pre_attention(x, stack, 1, sizes=sizes, gate_only=True, epsilon=1e-6, tiling=tiling)
        return x

    shape, operands = {"width": width, "sizes": list(sizes)}, [x, *(weights[name] for name in names)]
    return Shape("pre_attention", f"{tokens} rows", shape, tokens, input_tilings(tokens), run, operands)


def _after(tokens: int) -> Shape:
    width, random = 512, np.random.default_rng(0)
    weights = hstu_weights(random)
    names = [name for name in weights if name.startswith("out")]
    o, u, x = (
        jax.random.normal(key, (1, tokens, width), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)
    )

    def run(tiling: Any, o: jax.Array, u: jax.Array, x: jax.Array, *given: jax.Array) -> jax.Array:
        stack = dict(zip(names, given, strict=True))
        for _ in range(CHAIN):
            x = gated_output.gated_output(o, u, x, stack, 1, epsilon=1e-6, tiling=tiling)
        return x

    shape = {"width": width, "values": width, "whole": True}
    operands = [o, u, x, *(weights[name] for name in names)]
    return Shape("gated_output", f"{tokens} rows", shape, tokens, output_tilings(), run, operands)


def _paged_attention(case: AttentionCase) -> Shape:
    """Candidates of equal requests, whose histories lie in pages."""
    (q, k, v, rows, time), activation, bias = inputs(case)
    first, count = case.bucket.tokens - case.bucket.candidates, len(case.extents)
    per_request = -(-case.extents[0].history // pages.ROWS)
    *keys, order = jax.random.split(jax.random.key(1), 3)
    shape = (case.blocks, count * per_request, pages.ROWS, case.heads, case.dim)
    pool = [jax.random.normal(key, shape, k.dtype) for key in keys]
    used = rows[:, CANDIDATE_COUNT] > 0
    rows = rows.at[:, CANDIDATE_START].add(jnp.where(used, -first, 0)).at[:, HISTORY_START].set(0)
    table = jax.random.permutation(order, count * per_request).reshape(count, per_request).astype(jnp.int32)
    table = jnp.pad(table, ((0, len(rows) - count), (0, 0)))

    def run(tiling: Any, q: jax.Array, *rest: jax.Array) -> jax.Array:
        k, v, rows, time, keys, values, table = rest
        settings: dict[str, Any] = {"activation": activation, "bias": None, "causal": True, "align": 64}
        for _ in range(CHAIN):
            history = Pages(keys, values, table, None)
            q = sumi_attention.sumi_attention(q, k, v, rows, time, **settings, history=history, tiling=tiling)
        return q

    shape_of = sumi_attention.tuned_shape(case.heads, case.dim, case.dim, activation, bias, causal=False)
    tilings = [
        t
        for t in attention_tilings(case.heads, case.dim, case.dim, biased=bias is not None)
        if pages.ROWS % t.keys == 0
    ]
    operands = [*(x[:, first:] for x in (q, k, v)), rows, time[:, first:], *pool, table]
    rows_in_all = case.blocks * case.bucket.candidates
    return Shape("paged_attention", case.name, shape_of, rows_in_all, tilings, run, operands)


OPERATIONS: dict[str, list[Callable[[], Shape]]] = {
    "sumi_attention": [partial(_attention, case) for case in ATTENTIONS],
    "paged_attention": [partial(_paged_attention, case) for case in HSTU],
    "post_attention": [partial(_layer, tokens) for tokens in (384, 3072, 12288, 32768)],
    "pre_attention": [partial(_before, tokens) for tokens in HSTU_ROWS],
    "gated_output": [partial(_after, tokens) for tokens in HSTU_ROWS],
}


def _compile(pool: Executor, place: Place, operands: list[jax.Array]) -> Launch:
    platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    program = jax.export.deserialize(bytearray(pool.submit(_exported, place, platform).result()))
    return partial(jax.jit(program.call).lower(*operands).compile(), *operands)


def _exported(place: Place, platform: str) -> bytes:
    """A program in portable form, made without its operands."""
    shape = _abstract(place.operation, place.number)
    program = jax.jit(shape.program(shape.tilings[place.tiling]))
    return bytes(jax.export.export(program, platforms=[platform])(*shape.operands).serialize())


def _abstract(operation: str, number: int) -> Shape:
    """A shape with specifications in place of operands."""
    made: list[Shape] = []

    def operands() -> list[jax.Array]:
        made.append(OPERATIONS[operation][number]())
        return made[0].operands

    specs: Any = jax.eval_shape(operands)
    return made[0]._replace(operands=specs)


def _fastest(shape: Shape, launches: dict[str, Launch], progress: Callable[[str], None]) -> Row:
    name = f"{shape.operation} {shape.name}"
    _drop_odd(launches, name, progress)
    times = side_by_side(launches, rounds=2, seconds=0.01)
    best = sorted(times, key=times.__getitem__)[:FINALISTS]
    finals = side_by_side({tiling: launches[tiling] for tiling in best}, rounds=5, seconds=0.02)
    order = [*sorted(best, key=finals.__getitem__), *sorted(times.keys() - finals.keys(), key=times.__getitem__)]
    microseconds = {tiling: round((times | finals)[tiling] * 1e3 / CHAIN / shape.repeats, 2) for tiling in order}
    progress(f"{name}: " + ", ".join(f"{tiling} {microseconds[tiling]} us" for tiling in order[:FINALISTS]))
    tiling = next(t for t in shape.tilings if str(t) == order[0])
    return Row(shape.operation, shape.name, shape.shape, shape.rows, microseconds, vars(tiling))


def _drop_odd(launches: dict[str, Launch], name: str, progress: Callable[[str], None]) -> None:
    """Leave those whose results are equal to what most of them give."""
    results = {tiling: run()[0] for tiling, run in launches.items()}
    apart = {usual: {t: float(_apart(r, results[usual])) for t, r in results.items()} for usual in results}
    usual = max(apart, key=lambda tiling: sum(far <= SAME for far in apart[tiling].values()))
    for tiling, far in apart[usual].items():
        if not far <= SAME:
            progress(f"{name}: {tiling} is {far:.3g} off and left out")
            del launches[tiling]


@jax.jit
def _apart(result: jax.Array, usual: jax.Array) -> jax.Array:
    """Largest difference, in units of the largest value where that is above 1."""
    result, usual = result.astype(jnp.float32), usual.astype(jnp.float32)
    return jnp.abs(result - usual).max() / jnp.maximum(1.0, jnp.abs(usual).max())
