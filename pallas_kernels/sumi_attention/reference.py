"""SUMI attention in plain jax.numpy: every query tile reads a window of its own request's history.

Nothing is ever T x T, and no reduction crosses the token axis, so a row's bits do not depend on what else is
in the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels.segments import Tiles, tiles

MASKED = -1e30
"""Logit of a key that a query does not see: finite, so that a row without history stays free of NaN."""


def log2_distance(difference: jax.Array) -> jax.Array:
    """log2(1 + |difference|) in float32, for an int32 difference."""
    return jnp.log2(1.0 + jnp.abs(difference).astype(jnp.float32))


def sumi_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    time: jax.Array,
    *,
    temperature: jax.Array,
    bias: jax.Array | None,
    align: int,
    window: int,
) -> jax.Array:
    """See `api.sumi_attention`."""
    blocks, tokens = k.shape[:2]
    query_rows = q.shape[1]
    first = tokens - query_rows
    pad = ((0, 0), (0, window), (0, 0), (0, 0))
    k_padded, v_padded = jnp.pad(k, pad), jnp.pad(v, pad)
    time_padded = jnp.pad(time, ((0, 0), (0, window)))

    def one_tile(tile: Tiles) -> jax.Array:
        rows_of = lambda x, start, size: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        keys = rows_of(k_padded, tile.history_start, window)
        values = rows_of(v_padded, tile.history_start, window)
        query = rows_of(q, tile.start - first, align)
        inverse_temperature = 1.0 / temperature[:, tile.scenario, :, None, None]

        # Position inside the request: a history row's own, or one past the newest event for a candidate.
        local = jnp.arange(align, dtype=jnp.int32) + tile.start - tile.history_start
        length = tile.history_length[:, None]
        in_history = tile.is_history & (local[None, :] < length)
        position = jnp.where(in_history, local[None, :], length)
        key_position = jnp.arange(window, dtype=jnp.int32)

        logits = jnp.einsum("bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32)
        if bias is not None:
            alpha, beta, gamma = jnp.moveaxis(bias[:, tile.scenario, :, None, None, :], -1, 0)
            query_time = rows_of(time, tile.start, align)
            key_time = rows_of(time_padded, tile.history_start, window)
            far = log2_distance(position[:, :, None] - key_position[None, None, :])[:, None]
            old = log2_distance(query_time[:, :, None] - key_time[:, None, :])[:, None]
            logits += alpha * far + beta * old + gamma
        seen = key_position[None, :] < length
        logits = jnp.where(seen[:, None, None, :], logits * inverse_temperature, MASKED)
        # The window runs on into other requests' rows: a weight of 0 would not silence a NaN or an infinity there.
        values = jnp.where(seen[:, :, None, None], values, 0)

        # A row that is no history row sees its own key besides; that keeps padding rows finite too.
        own_key = rows_of(k, tile.start, align)
        own = jnp.einsum("bqhd,bqhd->bhq", query, own_key, preferred_element_type=jnp.float32)[..., None]
        own = jnp.where(in_history[:, None, :, None], MASKED, own * inverse_temperature)

        peak = jnp.maximum(logits.max(axis=-1, keepdims=True), own)
        weights, own_weight = jnp.exp(logits - peak), jnp.exp(own - peak)
        total = weights.sum(axis=-1, keepdims=True) + own_weight
        weights, own_weight = (weights / total).astype(v.dtype), (own_weight / total).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values, preferred_element_type=jnp.float32)
        own_value = rows_of(v, tile.start, align)
        return (mixed + jnp.moveaxis(own_weight, 1, 2) * own_value).astype(v.dtype)

    out = jax.lax.map(one_tile, tiles(rows, align=align, first=first, last=tokens))
    return jnp.moveaxis(out, 0, 1).reshape(blocks, query_rows, *v.shape[2:])
