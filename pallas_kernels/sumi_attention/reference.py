"""SUMI attention in plain jax.numpy: every query tile reads a window of its own request's history.

Nothing is ever T x T, and no reduction crosses the token axis, so a row's bits do not depend on what else is
in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels.segments import Tiles, histories_elsewhere, tiles
from flame_jax.pallas_kernels.sumi_attention.types import Activation, Bias, LogBias, Pages, Softmax, TableBias
from flame_jax.pallas_kernels.time_buckets import log_bucket

MASKED = -1e30
"""Logit of a key that a query does not see: finite, so that a row without history stays free of NaN."""


class _Keys(NamedTuple):
    """The window: position int32[w], time int32[blocks, w], and what is a key of the request."""

    k: jax.Array
    v: jax.Array
    position: jax.Array
    time: jax.Array


class _Queries(NamedTuple):
    """A tile: its own keys and values, and position, time, successor's time, in_history [blocks, tile]."""

    q: jax.Array
    own_k: jax.Array
    own_v: jax.Array
    position: jax.Array
    time: jax.Array
    successor: jax.Array
    in_history: jax.Array


Window = Callable[[Tiles], tuple[jax.Array, ...]]
"""Of a tile's request `window` rows of keys, values and times, [blocks, window, ...] each: its own come first."""


def sumi_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    time: jax.Array,
    *,
    activation: Activation,
    bias: Bias | None,
    causal: bool,
    align: int,
    window: int,
    tiles_at_once: int,
    history: Pages | None = None,
) -> jax.Array:
    """See `api.sumi_attention`."""
    blocks, tokens = k.shape[:2]
    first = tokens - q.shape[1]
    if history is None:
        window_of = _in_rows(k, v, time, window)
    else:
        window, rows = min(window, history.capacity), histories_elsewhere(rows, align)
        window_of = _in_pages(history, bias, window)
    time_padded = jnp.pad(time, ((0, 0), (0, 1)))  # the last row, too, is cut out with a successor

    def one_tile(tile: Tiles) -> jax.Array:
        def part(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        local = jnp.arange(align, dtype=jnp.int32)[None] + tile.start - tile.history_start
        length = tile.history_length[:, None]
        in_history = tile.is_history & (local < length)
        own_time = part(time, tile.start, align)
        has_successor = in_history & (local + 1 < length)
        queries = _Queries(
            q=part(q, tile.start - first, align),
            own_k=part(k, tile.start, align),
            own_v=part(v, tile.start, align),
            # A candidate's position is its history's length.
            position=jnp.where(in_history, local, length),
            time=own_time,
            successor=jnp.where(has_successor, part(time_padded, tile.start + 1, align), own_time),
            in_history=in_history,
        )
        position = jnp.arange(window, dtype=jnp.int32)
        of_request = position < length
        k_window, v_window, time_window = window_of(tile)
        keys = _Keys(
            k=k_window,
            # The window runs on into other requests' rows: a weight of 0 would not silence a NaN there.
            v=jnp.where(of_request[:, :, None, None], v_window, 0),
            position=position,
            time=time_window,
        )
        seen = jnp.broadcast_to(of_request[:, None, :], (blocks, align, window))
        if causal:
            seen &= position <= queries.position[..., None]
        return _attend(queries, keys, seen, activation, bias, tile.scenario)

    batch_size = tiles_at_once if tiles_at_once > 1 else None
    out = jax.lax.map(one_tile, tiles(rows, align=align, first=first, last=tokens), batch_size=batch_size)
    return jnp.moveaxis(out, 0, 1).reshape(blocks, q.shape[1], *v.shape[2:])


def _in_rows(k: jax.Array, v: jax.Array, time: jax.Array, window: int) -> Window:
    """Histories among the token rows."""
    # Rows beyond the end, so that a window always lies inside.
    padded = [jnp.pad(x, ((0, 0), (0, window), *[(0, 0)] * (x.ndim - 2))) for x in (k, v, time)]

    def window_of(tile: Tiles) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.dynamic_slice_in_dim(x, tile.history_start, window, axis=1) for x in padded)

    return window_of


def _in_pages(history: Pages, bias: Bias | None, window: int) -> Window:
    time = jnp.zeros(history.k.shape[:3], jnp.int32) if bias is None else history.times

    def window_of(tile: Tiles) -> tuple[jax.Array, ...]:
        gathered = [x[:, history.table[tile.request]] for x in (history.k, history.v, time)]
        return tuple(x.reshape(len(x), -1, *x.shape[3:])[:, :window] for x in gathered)

    return window_of


def _attend(
    queries: _Queries, keys: _Keys, seen: jax.Array, activation: Activation, bias: Bias | None, scenario: jax.Array
) -> jax.Array:
    """One tile: [blocks, tile, heads, dv] from the window's keys and each row's own key."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", queries.q, keys.k, preferred_element_type=jnp.float32)
    own = jnp.einsum("bqhd,bqhd->bhq", queries.q, queries.own_k, preferred_element_type=jnp.float32)[..., None]
    if not isinstance(activation, Softmax):
        logits, own = logits * activation.scale, own * activation.scale
    if isinstance(bias, LogBias):
        logits += _log_bias(bias, scenario, queries, keys)
    elif bias is not None:
        logits += _table_bias(bias, queries, keys)
        own += bias.position[bias.position.shape[0] // 2] + bias.time[0]

    # A row that is no history row sees its own key besides; that keeps padding rows finite too.
    seen, sees_own = seen[:, None], ~queries.in_history[:, None, :, None]
    if isinstance(activation, Softmax):
        inverse = 1.0 / activation.own[:, scenario, :, None, None]
        logits = jnp.where(seen, logits * inverse, MASKED)
        own = jnp.where(sees_own, own * inverse, MASKED)
        peak = jnp.maximum(logits.max(axis=-1, keepdims=True), own)
        weights, own_weight = jnp.exp(logits - peak), jnp.exp(own - peak)
        total = weights.sum(axis=-1, keepdims=True) + own_weight
        weights, own_weight = weights / total, own_weight / total
    else:
        weights = jnp.where(seen, jax.nn.silu(logits), 0.0) / activation.divisor
        own_weight = jnp.where(sees_own, jax.nn.silu(own), 0.0) / activation.divisor
    dtype = keys.v.dtype
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), keys.v, preferred_element_type=jnp.float32)
    return (mixed + jnp.moveaxis(own_weight.astype(dtype), 1, 2) * queries.own_v).astype(dtype)


def _log_bias(bias: LogBias, scenario: jax.Array, queries: _Queries, keys: _Keys) -> jax.Array:
    """float32[blocks, heads, tile, window]."""

    def log2_distance(difference: jax.Array) -> jax.Array:
        return jnp.log2(1.0 + jnp.abs(difference).astype(jnp.float32))[:, None]

    alpha, beta, gamma = jnp.moveaxis(bias.own[:, scenario, :, None, None, :], -1, 0)
    far = log2_distance(queries.position[..., None] - keys.position)
    old = log2_distance(queries.time[:, :, None] - keys.time[:, None, :])
    total: jax.Array = alpha * far + beta * old + gamma
    return total


def _table_bias(bias: TableBias, queries: _Queries, keys: _Keys) -> jax.Array:
    """float32[blocks, 1, tile, window], the same for every head."""
    middle = bias.position.shape[0] // 2
    offset = jnp.clip(queries.position[..., None] - keys.position, -middle, middle) + middle
    bucket = log_bucket(queries.successor[:, :, None] - keys.time[:, None, :], bias.time.shape[0])
    total: jax.Array = bias.position[offset] + bias.time[bucket]
    return total[:, None]
