"""Is the kernel of a whole stack of layers right on this device? As in `check`, and the same bits again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.fke.cases import following, layer_weights
from flame_jax.packing import Bucket, Extent, Layout, place
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.layer_stack.api import layer_stack
from flame_jax.pallas_kernels.segments import owned

LAYOUT, BUCKET, BLOCKS, WIDTH, WINDOW = Layout(align=64, max_requests=16), Bucket(4096, 2048), 2, 128, 1024
DEPTH = 4
RUNS = 200
"""A thread block that reads before another has written would be seen now and then."""
STACK = REFERENCE._replace(layer_stack="mosaic")
OURS = Extent(200, 70)
BATCHES = {
    "one candidate, no history": [Extent(0, 1)],
    "a long history": [Extent(1000, 500)],
    "full": [Extent(256, 256)] * 8,
    "histories among the last rows": [Extent(1000, 64)] * 3,
    "16 requests": [Extent(17 + 5 * n, 1 + 3 * n) for n in range(16)],
    "alone": [OURS],
    "among others": [Extent(130, 9), OURS, Extent(1, 1), Extent(700, 300)],
}


class Batch(NamedTuple):
    """x is bfloat16[blocks, T, 128]; `ours` are the candidates of `OURS`, among the candidate rows."""

    x: np.ndarray
    rows: np.ndarray
    time: np.ndarray
    ours: slice


def check_stack(
    name: str,
    report: Callable[[str, bool], None],
    random: np.random.Generator,
    apart: Callable[..., None],
    runs: int = RUNS,
    kernels: Kernels = STACK,
) -> None:
    """Against float32, a layer at a time.

    Args:
        apart: reports the distance between two lists of arrays.
        kernels: what is checked.
    """
    weights = jax.tree.map(lambda w: jnp.tile(w, (DEPTH // 2, *[1] * (w.ndim - 1))), layer_weights(random))
    exact = {key: w.astype(jnp.float32) for key, w in weights.items()}
    shape = (DEPTH, BLOCKS, 2, 2)
    temperature = jnp.asarray(random.uniform(4, 12, shape), jnp.float32)
    coefficients = jnp.asarray(0.1 * random.normal(size=(*shape, 3)), jnp.float32)
    about: dict[str, Any] = {
        "temperature": temperature,
        "coefficients": coefficients,
        "first_candidate": BUCKET.tokens - BUCKET.candidates,
        "align": LAYOUT.align,
        "window": WINDOW,
    }
    run = jax.jit(partial(layer_stack, following=following(weights), kernels=kernels, **about))
    plain = jax.jit(partial(layer_stack, following=following(exact), **about))
    bits: dict[str, list[bytes]] = {}
    source = np.asarray(random.normal(size=(BLOCKS, BUCKET.tokens, WIDTH)), jnp.bfloat16)
    for what, extents in BATCHES.items():
        batch = _batch(source, extents, random)
        mine = np.asarray(owned(jnp.asarray(batch.rows), BUCKET.tokens, align=LAYOUT.align))
        left = np.where(mine[..., None], batch.x, np.asarray(np.nan, batch.x.dtype))
        found = jax.device_get(run(left, weights, batch.rows, batch.time))
        with jax.default_matmul_precision("highest"):
            expected = jax.device_get(plain(batch.x.astype(np.float32), exact, batch.rows, batch.time))
        candidates = mine[:, -BUCKET.candidates :]
        apart(f"{name}: {what}", [y[candidates] for y in found], [y[candidates] for y in expected], report)
        again = [[y.tobytes() for y in jax.device_get(run(left, weights, batch.rows, batch.time))] for _ in range(runs)]
        same = all(other == [y.tobytes() for y in found] for other in again)
        report(f"{name}: {what}: equal bits {runs} times, finite", same and all(np.isfinite(y).all() for y in found))
        bits[what] = [y[:, batch.ours].tobytes() for y in found]
    report(f"{name}: equal bits alone and among others", bits["alone"] == bits["among others"])


def _batch(source: np.ndarray, extents: list[Extent], random: np.random.Generator) -> Batch:
    """Random requests, of which `OURS` is always the same, wherever it lies."""
    rows = np.zeros((LAYOUT.max_requests, 5 + BLOCKS), np.int32)
    time, x, ours = np.zeros((BLOCKS, BUCKET.tokens), np.int32), source.copy(), slice(0)
    for number, (extent, where) in enumerate(zip(extents, place(extents, BUCKET, LAYOUT), strict=True)):
        start, first = where.candidate_start, where.history_start
        lengths, now = [extent.history, extent.history // 2], int(random.integers(10**9, 2 * 10**9))
        if extent == OURS:
            now = 1_500_000_000
            place_of = start - BUCKET.tokens + BUCKET.candidates
            ours = slice(place_of, place_of + extent.candidates)
            at = np.concatenate([first + np.arange(extent.history), start + np.arange(extent.candidates)])
            x[:, at] = source[:, : len(at)]
        rows[number] = (first, start, extent.candidates, number % 2 if extent != OURS else 1, now, *lengths)
        time[:, first : first + extent.history] = now - 10**6 * np.arange(extent.history, 0, -1)
        time[:, start : start + extent.candidates] = now
    return Batch(x, rows, time, ours)
