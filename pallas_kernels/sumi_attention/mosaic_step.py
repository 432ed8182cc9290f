"""Arithmetic of one step: 64 query rows of a thread block's heads against a stage's keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flame_jax.pallas_kernels.hopper import COLUMN, FULL, ROW, TILE, per_column, per_row, silu
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import MASKED, Form, Memory


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


def bias_of(logs: Any, factors: list[Any]) -> jax.Array:
    """A head's bias: per pair, or per key."""
    far, old = logs
    bias: jax.Array = far * factors[1] + old * factors[2] + factors[3]
    return bias


def logits_of(scores: jax.Array, scale: Any, bias: Any) -> jax.Array:
    """Scaled scores plus the bias, if there is any."""
    logits = scores * scale
    if bias is None:
        return logits
    return logits + (per_column(bias, logits) if bias.ndim == 1 else bias)


def weigh(logits: jax.Array, hidden: Any, running: tuple[Any, ...], form: Form) -> tuple[Any, Any, tuple[Any, ...]]:
    """Weights of a step's keys in the values' dtype; what is mixed so far must be multiplied by; the running sums."""
    if not form.softmax:
        weights = silu(logits)
        weights = weights if hidden is None else jnp.where(hidden, 0.0, weights)
        return weights.astype(form.dtype), None, ()
    peak, total = running
    logits = logits if hidden is None else jnp.where(hidden, MASKED, logits)
    new_peak = jnp.maximum(peak, logits.max(axis=1))
    decay = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(logits - per_row(new_peak, logits))
    return weights.astype(form.dtype), decay, (new_peak, total * decay + weights.sum(axis=1))
