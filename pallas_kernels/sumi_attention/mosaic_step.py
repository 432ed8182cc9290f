"""Arithmetic of one step: 64 query rows of a thread block's heads against a stage's keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import COLUMN, FULL, ROW, TILE, per_column, per_row, silu
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import MASKED, Form


def scores_of(q: Any, k: Any, form: Form) -> list[jax.Array]:
    """q . k of every head, float32[64, keys]."""

    def products(*accumulators: Any) -> list[jax.Array]:
        for i, accumulator in enumerate(accumulators):
            plgpu.wgmma(accumulator, q.at[i], k.at[i].T)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(products, *[plgpu.ACC((TILE, form.tiling.keys), jnp.float32)] * form.together)


def known_logs(key_log: Any) -> tuple[jax.Array, jax.Array]:
    """log2(1 + |dp|) and log2(1 + |dt|) between candidates and a step's keys, float32[keys] each; they differ by key
    alone. `key_log` is float32[2, keys]."""
    far, old = (plgpu.load(key_log.at[i], layout=COLUMN) for i in range(2))
    return far, old


def pair_logs(ahead: jax.Array, own_time: Any, key_time: Any) -> tuple[jax.Array, jax.Array]:
    """log2(1 + |dp|) and log2(1 + |dt|) of every pair of history rows, float32[64, keys] each.

    Differences are taken in float32: converting integers pair by pair would cost as much as the logarithms.

    Args:
        ahead: positions from the first key to the first row.
        own_time: float32[2, 64], `schedule.time_parts` of the rows.
        key_time: float32[2, keys], those of the keys.
    """
    shape = (TILE, key_time.shape[1])

    def between(row: jax.Array, column: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row, shape, [0]) - lax.broadcast_in_dim(column, shape, [1])

    def count(size: int, layout: Any) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)

    own = [plgpu.load(own_time.at[i], layout=ROW) for i in range(2)]
    key = [plgpu.load(key_time.at[i], layout=COLUMN) for i in range(2)]
    position = between((count(TILE, ROW) + ahead).astype(jnp.float32), count(shape[1], COLUMN).astype(jnp.float32))
    time = between(own[0], key[0]) + between(own[1], key[1])
    far, old = (jnp.log2(1.0 + jnp.abs(d)) for d in (position, time))
    return far, old


def hidden_pairs(length: jax.Array, begin: jax.Array, key: jax.Array, keys: int, causal: bool) -> jax.Array:
    """Which pairs are masked, bool[64, keys]."""
    shape = (TILE, keys)
    position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=FULL) + key
    hidden = position >= length
    if causal:
        hidden = jnp.logical_or(hidden, position > plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=FULL) + begin)
    return hidden


def logits_of(scores: jax.Array, factors: list[Any], logs: Any) -> jax.Array:
    """Scaled scores plus the bias."""
    logits = scores * factors[0]
    if logs is None:
        return logits
    far, old = logs
    terms = far * factors[1] + old * factors[2] + factors[3]
    return logits + (per_column(terms, logits) if terms.ndim == 1 else terms)


def nothing(v_dim: int, softmax: bool) -> tuple[Any, ...]:
    """The state before the first key: mixed values, and for softmax the largest logit and the sum of weights."""

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    mixed = full((TILE, v_dim), 0.0, FULL)
    return (mixed, full((TILE,), MASKED, ROW), full((TILE,), 0.0, ROW)) if softmax else (mixed,)


def see_own(
    own: tuple[Any, Any, Any], begin: jax.Array, length: jax.Array, is_history: jax.Array, scale: Any, softmax: bool
) -> tuple[Any, ...]:
    """The same where a row that is no history row has seen its own key; `own` is q, k and v of the 64 rows."""
    position = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROW) + begin
    sees = jnp.logical_or(position >= length, jnp.logical_not(is_history))
    q, k, value = (plgpu.load(ref, layout=FULL).astype(jnp.float32) for ref in own)
    logit = jnp.sum(q * k, axis=1) * scale
    weight = jnp.where(sees, 1.0 if softmax else silu(logit), 0.0)
    mixed = value * per_row(weight, value)
    return (mixed, jnp.where(sees, logit, MASKED), weight) if softmax else (mixed,)


def weigh(logits: jax.Array, hidden: Any, state: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """Weights of the step's keys, in the values' dtype; the state, with what it mixed so far scaled to match."""
    mixed, *running = state
    if not running:
        weights = silu(logits)
        weights = weights if hidden is None else jnp.where(hidden, 0.0, weights)
        return weights.astype(dtype), mixed
    peak, total = running
    logits = logits if hidden is None else jnp.where(hidden, MASKED, logits)
    new_peak = jnp.maximum(peak, logits.max(axis=1))
    decay = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(logits - per_row(new_peak, logits))
    total = total * decay + weights.sum(axis=1)
    return weights.astype(dtype), mixed * per_row(decay, mixed), new_peak, total


def mix(weighted: list[tuple[Any, ...]], v: Any, staging: Any) -> list[jax.Array]:
    """Add the weighted values of every head to what it mixed so far."""
    if staging is None:

        def accumulate(accumulators: Any) -> None:
            for i, accumulator in enumerate(accumulators):
                plgpu.wgmma(accumulator, weighted[i][0], v.at[i])

        return list(pl.run_state(accumulate)(tuple(plgpu.ACC.init(mixed) for _, mixed, *_ in weighted)))
    mixed = []
    for i, (weights, before, *_) in enumerate(weighted):
        staging[...] = weights
        plgpu.commit_smem()

        def product(accumulator: Any, i: int = i) -> jax.Array:
            plgpu.wgmma(accumulator, staging, v.at[i])
            return accumulator[...]

        mixed.append(before + pl.run_scoped(product, plgpu.ACC(before.shape, jnp.float32)))
    return mixed
