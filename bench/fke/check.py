"""Are the kernels right on this device? Random request tables against float64, poisoned memory, moved requests."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.fke import oracle, pages
from bench.fke.cases import following, hstu_weights, layer_weights
from bench.fke.check_stack import check_stack
from bench.fke.choice import chosen
from flame_jax.packing import (
    CANDIDATE_START,
    HISTORY_LENGTH,
    HISTORY_START,
    REQUEST_TIME,
    Bucket,
    Extent,
    Layout,
    place,
)
from flame_jax.pallas_kernels.gated_output import api as gated_output_api
from flame_jax.pallas_kernels.gated_output import mosaic as gated_output
from flame_jax.pallas_kernels.post_attention import api as post_attention_api
from flame_jax.pallas_kernels.post_attention import mosaic as post_attention
from flame_jax.pallas_kernels.pre_attention import api as pre_attention_api
from flame_jax.pallas_kernels.pre_attention import mosaic as pre_attention
from flame_jax.pallas_kernels.sumi_attention.types import Bias, LogBias, Pages, Silu, Softmax, TableBias

LAYOUT, BUCKET, SCENARIOS = Layout(align=64, max_requests=64), Bucket(8192, 4096), 3
TOLERANCE = {0.99: 0.01, 1.0: 0.06}
"""Share of the elements -> largest difference, in units of the values' spread: bfloat16 holds three digits."""
HSTU_CASES = [(64, 1), (320, 1), (3072, 1), (17024, 1), (320, 2), (17024, 2)]
"""Rows, and thread blocks of a cluster: 1 with the block sizes that are served. 17,024 rows are more items than an H100
has multiprocessors."""

DEVICE = threading.Lock()
"""Held by the check that runs something; the others may compile in the meantime."""

Report = Callable[[str, bool], None]
Check = Callable[[str, Report, np.random.Generator], None]


class Attention(NamedTuple):
    """One form of the kernel."""

    name: str
    blocks: int
    heads: int
    qk_dim: int
    v_dim: int
    softmax: bool
    bias: Literal["none", "log", "table"]
    causal: bool
    kernel: Literal["mosaic", "triton"] = "mosaic"


ATTENTIONS = [
    Attention("climber", 2, 2, 64, 64, softmax=True, bias="log", causal=False),
    Attention("softmax", 1, 4, 64, 64, softmax=True, bias="none", causal=False),
    Attention("softmax causal, bias", 1, 2, 32, 32, softmax=True, bias="log", causal=True),
    Attention("hstu", 1, 2, 128, 128, softmax=False, bias="none", causal=True),
    Attention("silu, bias", 1, 2, 64, 128, softmax=False, bias="log", causal=True),
    Attention("wide heads", 1, 1, 256, 256, softmax=False, bias="none", causal=True),
]

TRITON = [
    *(form._replace(name=f"{form.name}, Triton", kernel="triton") for form in ATTENTIONS),
    Attention("tables, Triton", 1, 2, 64, 128, softmax=False, bias="table", causal=True, kernel="triton"),
]
"""The second implementation, where jax-triton is installed."""
PAGED = [
    Attention("climber, pages", 2, 2, 64, 64, softmax=True, bias="log", causal=False),
    Attention("hstu, pages", 1, 4, 128, 128, softmax=False, bias="none", causal=True),
]
"""With histories in pages."""
LONGEST = 1024
"""Rows of history that `tables` gives a request at most."""


def tables(random: np.random.Generator) -> Iterator[tuple[str, list[Extent]]]:
    """Batches: what each of them is, and its requests."""
    yield "one candidate, no history", [Extent(0, 1)]
    yield "4,000 candidates", [Extent(777, 4000)]
    yield "64 requests", [Extent(int(random.integers(0, 65)), int(random.integers(1, 65))) for _ in range(64)]
    yield "full", [Extent(1024, 1024)] * 4
    for number in range(3):
        count = int(random.integers(1, 11))
        yield (
            f"random {number}",
            [Extent(int(random.integers(0, 257)), int(random.integers(1, 385))) for _ in range(count)],
        )


def check(report: Report, only: Sequence[str] = (), seed: int = 0) -> None:
    """Report every check, of the block sizes that are served, by name and outcome.

    Args:
        only: operations whose names hold one of these; all of them if there are none.
    """
    checks: dict[str, Check] = {f"sumi_attention {form.name}": partial(_check_attention, form) for form in ATTENTIONS}
    checks |= {f"sumi_attention {form.name}": partial(_check_pages, form) for form in PAGED}
    if importlib.util.find_spec("jax_triton"):
        checks |= {f"sumi_attention {form.name}": partial(_check_attention, form) for form in TRITON}
    checks |= {"post_attention": _check_layer, "layer_stack": _check_stack}
    for rows, cluster in HSTU_CASES:
        what = f"{rows} rows, cluster of {cluster}"
        checks[f"pre_attention {what}"] = partial(_check_before, rows, cluster)
        checks[f"gated_output {what}"] = partial(_check_after, rows, cluster)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(_guarded, checks[name], name, report, seed) for name in chosen(checks, only, str)]:
            done.result()


def _guarded(run: Check, name: str, report: Report, seed: int) -> None:
    try:
        run(name, report, np.random.default_rng(seed))
    except Exception as error:  # a kernel that does not compile is a miss like another
        report(f"{name}: {type(error).__name__}: {str(error)[:300]}", False)


def request_rows(extents: list[Extent], blocks: int, random: np.random.Generator) -> np.ndarray:
    """int32[R, 5 + blocks]; the first block's history is the longest."""
    rows = np.zeros((LAYOUT.max_requests, 5 + blocks), np.int32)
    for number, (extent, where) in enumerate(zip(extents, place(extents, BUCKET, LAYOUT), strict=True)):
        lengths = [extent.history, *random.integers(0, extent.history + 1, blocks - 1).tolist()]
        scenario, now = random.integers(SCENARIOS), random.integers(10**9, 2 * 10**9)
        rows[number] = (where.history_start, where.candidate_start, extent.candidates, scenario, now, *lengths)
    return rows


class Batch(NamedTuple):
    """Packed requests.

    Attributes:
        arrays: q, k, v [blocks, T, heads, dim].
        ours: number of the request whose bits are compared, if it is there.
    """

    what: str
    arrays: list[np.ndarray]
    rows: np.ndarray
    time: np.ndarray
    ours: int | None

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """q, k, v, rows, time."""
        return *self.arrays, self.rows, self.time


def _batches(about: Attention, random: np.random.Generator) -> Iterator[Batch]:
    """Random ones; last "alone" and "among others", with one request in both."""
    blocks, heads = about.blocks, about.heads
    dims = (about.qk_dim, about.qk_dim, about.v_dim)
    arrays = [np.asarray(random.normal(size=(blocks, BUCKET.tokens, heads, dim)), jnp.bfloat16) for dim in dims]
    time = np.sort(random.integers(0, 2 * 10**9, (blocks, BUCKET.tokens))).astype(np.int32)
    ours = Extent(200, 70)
    for what, extents in [*tables(random), ("alone", [ours]), ("among others", [Extent(130, 9), ours, Extent(1, 1)])]:
        rows = request_rows(extents, blocks, random)
        inputs, when, number = list(arrays), time.copy(), extents.index(ours) if ours in extents else None
        if number is not None:
            rows[number] = _same_request(rows[number], blocks)
            inputs, when = _moved(arrays, time, rows[number])
        for row in rows[rows[:, 2] > 0]:
            when[:, row[CANDIDATE_START] : row[CANDIDATE_START] + row[2]] = row[REQUEST_TIME]
        yield Batch(what, inputs, rows, when, number)


def _form(about: Attention, random: np.random.Generator) -> tuple[oracle.Form, list[np.ndarray]]:
    """As the oracle has it; and what of it is handed to the program."""
    shape = (about.blocks, SCENARIOS, about.heads)
    form = oracle.Form(
        temperature=random.uniform(4, 12, shape).astype(np.float32) if about.softmax else None,
        scale=about.qk_dim**-0.5,
        divisor=32.0,
        coefficients=(0.3 * random.normal(size=(*shape, 3))).astype(np.float32) if about.bias == "log" else None,
        causal=about.causal,
        tables=_tables(random) if about.bias == "table" else None,
    )
    return form, [x for x in (form.temperature, form.coefficients, *(form.tables or ())) if x is not None]


def _tables(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions farther apart, and times, than the tables have rows for are among the batches'."""
    by_position, by_time = (random.normal(size=rows).astype(np.float32) for rows in (2 * 512 - 1, 64))
    return by_position, by_time


def _attend(
    about: Attention, form: oracle.Form, arrays: Sequence[jax.Array], *given: jax.Array, history: Pages | None = None
) -> jax.Array:
    """The kernel on q, k, v, rows and time."""
    left = list(given)
    activation = Softmax(left.pop(0)) if about.softmax else Silu(form.scale, form.divisor)
    forms: dict[str, Callable[..., Bias | None]] = {"none": lambda: None, "log": LogBias, "table": TableBias}
    kernel = importlib.import_module(f"flame_jax.pallas_kernels.sumi_attention.{about.kernel}")
    out: jax.Array = kernel.sumi_attention(
        *arrays,
        activation=activation,
        bias=forms[about.bias](*left),
        causal=about.causal,
        align=LAYOUT.align,
        history=history,
    )
    return out


def _check_attention(about: Attention, name: str, report: Report, random: np.random.Generator) -> None:
    form, given = _form(about, random)
    batches, bits = list(_batches(about, random)), {}
    compiled = _compiled(partial(_attend, about, form), batches[0].operands, *given)
    for batch in batches:
        with DEVICE:
            poison(batch.arrays[2].size)
            out = np.asarray(compiled(batch.operands, *given), np.float32)
        worst, good = _distance(out, batch, form, about)
        report(f"{name}: {batch.what}: {worst:.4f}", good and bool(np.isfinite(out).all()))
        if batch.ours is not None:
            row = batch.rows[batch.ours]
            bits[batch.what] = out[0, np.concatenate([row[0] + np.arange(row[5]), row[1] + np.arange(row[2])])]
    report(f"{name}: equal bits alone and among others", np.array_equal(bits["alone"], bits["among others"]))


def _check_pages(about: Attention, name: str, report: Report, random: np.random.Generator) -> None:
    """Candidates alone, with the same histories in pages."""
    form, given = _form(about, random)
    first = BUCKET.tokens - BUCKET.candidates
    pool = first // pages.ROWS + LAYOUT.max_requests  # every history may end in a page of its own

    def in_pages(arrays: Sequence[jax.Array], table: jax.Array, *given: jax.Array) -> jax.Array:
        q, k, v, rows, time = arrays
        at = jnp.clip(rows[:, :1] + jnp.arange(LONGEST), max=BUCKET.tokens - 1)
        lengths = rows[:, HISTORY_LENGTH:]
        keys, values, times = (pages.cut(x[:, at], lengths, table, pool) for x in (k, v, time))
        alone = rows.at[:, CANDIDATE_START].add(jnp.where(rows[:, 2] > 0, -first, 0)).at[:, HISTORY_START].set(0)
        candidates = (*(x[:, first:] for x in (q, k, v)), alone, time[:, first:])
        return _attend(about, form, candidates, *given, history=Pages(keys, values, table, times))

    batches, same, bits = list(_batches(about, random)), True, {}
    tables = [
        pages.page_table(batch.rows[:, HISTORY_LENGTH:].max(axis=1), LONGEST // pages.ROWS, pool, random)
        for batch in batches
    ]
    last_queries = [(batch.arrays[0][:, first:], *batch.operands[1:]) for batch in batches]
    paged = _compiled(in_pages, batches[0].operands, tables[0], *given)
    packed = _compiled(partial(_attend, about, form), last_queries[0], *given)
    for batch, table, candidates in zip(batches, tables, last_queries, strict=True):
        with DEVICE:
            poison(batch.arrays[2][:, first:].size)
            out = np.asarray(paged(batch.operands, table, *given), np.float32)
            last = np.asarray(packed(candidates, *given), np.float32)
        worst, good = _distance(out, batch, form, about, first)
        report(f"{name}: {batch.what}: {worst:.4f}", good and bool(np.isfinite(out).all()))
        owned = [np.arange(row[1], row[1] + row[2]) - first for row in batch.rows]
        at = np.concatenate(owned)
        same &= np.array_equal(out[:, at], last[:, at])
        if batch.ours is not None:
            bits[batch.what] = out[0, owned[batch.ours]]
    report(f"{name}: equal bits alone and among others", np.array_equal(bits["alone"], bits["among others"]))
    report(f"{name}: bits of packed rows", same)


def _same_request(row: np.ndarray, blocks: int) -> np.ndarray:
    """The request whose bits are compared, wherever it lies."""
    return np.array([row[0], row[1], row[2], 1, 1_500_000_000, row[5], *([row[5] // 2] * (blocks - 1))], np.int32)


def _moved(arrays: list[np.ndarray], time: np.ndarray, row: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The same numbers, taken from the front of the arrays, at the request's place."""
    n, count = int(row[5]), int(row[2])
    at = np.concatenate([row[0] + np.arange(n), row[1] + np.arange(count)])
    moved = [x.copy() for x in arrays]
    for mine, source in zip(moved, arrays, strict=True):
        mine[:, at] = source[:, : len(at)]
    when = time.copy()
    when[:, at] = time[:, : len(at)]
    return moved, when


def _distance(out: np.ndarray, batch: Batch, form: oracle.Form, about: Attention, first: int = 0) -> tuple[float, bool]:
    """Largest difference from the oracle of token rows from `first` on, and whether all are within the tolerances."""
    wide = [x.astype(np.float64) for x in batch.arrays]

    def one(row: np.ndarray, block: int, head: int) -> tuple[np.ndarray, float]:
        q, k, v = (x[block, :, head] for x in wide)
        at, expected = oracle.attention(q, k, v, row, batch.time[block].astype(np.int64), block, head, form)
        at, expected = at[at >= first] - first, expected[at >= first]
        return np.abs(out[block, at, head] - expected).ravel(), float(expected.std())

    every_one = product(batch.rows[batch.rows[:, 2] > 0], range(about.blocks), range(about.heads))
    with ThreadPoolExecutor() as pool:
        apart, spreads = zip(*pool.map(one, *zip(*every_one, strict=True)), strict=True)
    every = np.concatenate(apart) / max(1.0, *spreads)
    return float(every.max()), all(np.quantile(every, share) <= limit for share, limit in TOLERANCE.items())


def _compiled(function: Callable[..., Any], *operands: Any) -> Callable[..., Any]:
    # Of ways to multiply the reference takes any: to time them is most of the compiler's work.
    return jax.jit(function).lower(*operands).compile({"xla_gpu_autotune_level": "0"})


def poison(elements: int) -> None:
    """Leave NaN in freed device memory of this size, which the next output is likely to get."""
    for _ in range(2):
        jnp.full((elements,), jnp.nan, jnp.bfloat16).block_until_ready().delete()


def _check_stack(name: str, report: Report, random: np.random.Generator) -> None:
    with DEVICE:
        check_stack(name, report, random, _report_apart)


def _check_layer(name: str, report: Report, random: np.random.Generator) -> None:
    blocks, width, given = 2, 128, layer_weights(random)
    for rows in (64, 320, 4096):
        attended, x = (jnp.asarray(random.normal(size=(blocks, rows, width)), jnp.bfloat16) for _ in range(2))
        _compare(
            f"{name}: {rows} rows",
            lambda a, x, w: post_attention.post_attention(a, x, w, 0, following(w)),
            lambda a, x, w: post_attention_api.post_attention(a, x, w, 0, following=following(w)),
            (attended, x),
            given,
            report,
        )


def _check_before(rows: int, cluster: int, name: str, report: Report, random: np.random.Generator) -> None:
    width, given = 512, hstu_weights(random)
    tiling = pre_attention.Tiling(cluster=cluster) if cluster > 1 else None
    for gate_only in (True, False):
        settings: dict[str, Any] = {"sizes": (512,) * 4, "gate_only": gate_only, "epsilon": 1e-6}
        x = jnp.asarray(0.5 + random.normal(size=(1, rows, width)), jnp.bfloat16)
        kernel = partial(pre_attention.pre_attention, tiling=tiling, **settings)
        plain = partial(pre_attention_api.pre_attention, **settings)
        what = "SiLU of u" if gate_only else "SiLU of all"
        _compare(
            f"{name}: {what}",
            lambda x, w, kernel=kernel: kernel(x, w, 1),
            lambda x, w, plain=plain: plain(x, w, 1),
            (x,),
            given,
            report,
        )


def _check_after(rows: int, cluster: int, name: str, report: Report, random: np.random.Generator) -> None:
    width, whole = 512, hstu_weights(random)
    tiling = gated_output.Tiling(cluster=cluster) if cluster > 1 else None
    for given, first in ((whole, 0), (whole, 192), (whole | {"out_w": whole["out_w"][:, :width]}, 0)):
        arrays = tuple(
            jnp.asarray(random.normal(size=(1, n, width)), jnp.bfloat16) for n in (rows, rows + first, rows + first)
        )
        kernel = partial(gated_output.gated_output, epsilon=1e-6, first=first, tiling=tiling)
        plain = partial(gated_output_api.gated_output, epsilon=1e-6, first=first)
        _compare(
            f"{name}: from {first} on, {given['out_w'].shape[1]} inputs",
            lambda *operands, kernel=kernel: (kernel(*operands, 1),),
            lambda *operands, plain=plain: (plain(*operands, 1),),
            arrays,
            given,
            report,
        )


def _compare(
    name: str,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    arrays: tuple[jax.Array, ...],
    weights: dict[str, jax.Array],
    report: Report,
) -> None:
    """A kernel, and the reference on the same numbers in float32."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (*arrays, weights))
    compiled = _compiled(kernel, *arrays, weights)
    with jax.default_matmul_precision("highest"):
        reference = _compiled(plain, *exact)
    with DEVICE:
        poison(arrays[0].size)
        _report_apart(name, compiled(*arrays, weights), reference(*exact), report)


def _report_apart(name: str, found: Iterable[jax.Array], expected: Iterable[jax.Array], report: Report) -> None:
    apart = [
        np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)) for a, b in zip(found, expected, strict=True)
    ]
    every = np.concatenate([a.ravel() for a in apart])
    good = np.isfinite(every).all() and all(np.quantile(every, s) <= 2 * limit for s, limit in TOLERANCE.items())
    report(f"{name}: {every.max():.4f}", bool(good))
