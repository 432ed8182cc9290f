"""Where a token stands in its request, for models that encode it in the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flame_jax.models.ranker import Packed
from flame_jax.packing import REQUEST_TIME
from flame_jax.pallas_kernels.segments import Tiles, per_row, tiles


def _all_tiles(packed: Packed) -> Tiles:
    return tiles(packed.rows, align=packed.align, first=0, last=packed.time.shape[1])


def reversed_positions(packed: Packed) -> jax.Array:
    """int32[blocks, T]: how far a history row is from its history's end (1 for the newest), 0 for a candidate."""
    every = _all_tiles(packed)
    offset = jnp.arange(packed.align, dtype=jnp.int32)
    local = every.start[:, None] + offset - every.history_start[:, None]
    left = every.history_length[:, :, None] - local[:, None, :]
    left = jnp.where(every.is_history[:, None, None], jnp.maximum(left, 0), 0)
    return jnp.moveaxis(left, 1, 0).reshape(left.shape[1], -1)


def query_times(packed: Packed) -> jax.Array:
    """int32[T]: the request time of each token's request."""
    every = _all_tiles(packed)
    return per_row(packed.rows[every.request, REQUEST_TIME], packed.align)


def once_per_token(rows: jax.Array) -> jax.Array:
    """The same rows of a table, as an array in memory: XLA would find them anew for every number of the rows."""
    found: jax.Array = jax.lax.optimization_barrier(rows)
    return found
