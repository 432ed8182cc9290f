"""Arithmetic of one step: 64 query rows of a thread block's heads against a stage's keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flame_jax.pallas_kernels.hopper import COLUMN, FULL, ROW, TILE, per_column, per_row, silu
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import MASKED, Form, Memory


def scores_of(q: Any, k: Any, form: Form) -> list[jax.Array]:
    """q . k of every head, float32[64, keys]."""

    def products(*accumulators: Any) -> list[jax.Array]:
        for i, accumulator in enumerate(accumulators):
            plgpu.wgmma(accumulator, q.at[i], k.at[i].T)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(products, *[plgpu.ACC((TILE, form.tiling.keys), jnp.float32)] * form.together)


def logs_of(ahead: jax.Array, group: jax.Array, slot: jax.Array, memory: Memory, form: Form, history: bool) -> Any:
    """log2(1 + |dp|) and log2(1 + |dt|): per pair of history rows; for candidates per key, and known."""
    if not history:
        return tuple(plgpu.load(memory.key_log.at[slot, i], layout=COLUMN) for i in range(2))
    at = [plgpu.broadcasted_iota(jnp.int32, (TILE, form.tiling.keys), i, layout=FULL) for i in range(2)]
    position = at[0] - at[1] + ahead
    own, key = plgpu.load(memory.own_time.at[group], layout=ROW), plgpu.load(memory.key_time.at[slot], layout=COLUMN)
    differences = position, per_row(own, position) - per_column(key, position)
    return tuple(jnp.log2(1.0 + jnp.abs(d).astype(jnp.float32)) for d in differences)


def hidden_pairs(length: jax.Array, begin: jax.Array, key: jax.Array, form: Form, history: bool) -> jax.Array:
    """Which pairs are masked."""
    shape = (TILE, form.tiling.keys)
    position = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=FULL) + key
    hidden = position >= length
    if form.causal and history:
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


def weigh(logits: jax.Array, hidden: Any, state: tuple[Any, ...], form: Form) -> tuple[Any, ...]:
    """Weights of the step's keys, in the values' dtype; the state, with what it mixed so far scaled to match."""
    mixed, *running = state
    if not form.softmax:
        weights = silu(logits)
        weights = weights if hidden is None else jnp.where(hidden, 0.0, weights)
        return weights.astype(form.dtype), mixed
    peak, total = running
    logits = logits if hidden is None else jnp.where(hidden, MASKED, logits)
    new_peak = jnp.maximum(peak, logits.max(axis=1))
    decay = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(logits - per_row(new_peak, logits))
    total = total * decay + weights.sum(axis=1)
    return weights.astype(form.dtype), mixed * per_row(decay, mixed), new_peak, total


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
