"""What each tile of a packed batch belongs to, derived on the device from the request rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flame_jax.packing import CANDIDATE_COUNT, CANDIDATE_START, HISTORY_LENGTH, HISTORY_START, SCENARIO


class Tiles(NamedTuple):
    """One entry per aligned tile of query rows. A tile never belongs to two requests.

    Attributes:
        start: int32[tiles], the tile's first token row.
        request: int32[tiles], its request's row; 0 for padding, whose rows nobody reads.
        history_start: int32[tiles], first key row of that request.
        history_length: int32[tiles, blocks], keys per block; 0 for padding.
        is_history: bool[tiles], whether the tile lies in the history part.
        scenario: int32[tiles].
    """

    start: jax.Array
    request: jax.Array
    history_start: jax.Array
    history_length: jax.Array
    is_history: jax.Array
    scenario: jax.Array


def per_row(per_tile: jax.Array, align: int) -> jax.Array:
    """[tiles, ...] -> [tiles * align, ...]. A broadcast: `jnp.repeat` becomes several kernels."""
    shape = (len(per_tile), align, *per_tile.shape[1:])
    return jnp.broadcast_to(per_tile[:, None], shape).reshape(-1, *per_tile.shape[1:])


def longest(rows: jax.Array) -> jax.Array:
    """int32[R]: rows of each request's longest history."""
    # Written out for the few blocks there are: `max` over an axis may be a kernel of its own.
    found = rows[:, HISTORY_LENGTH]
    for block in range(HISTORY_LENGTH + 1, rows.shape[1]):
        found = jnp.maximum(found, rows[:, block])
    return found


def histories_elsewhere(rows: jax.Array, align: int) -> jax.Array:
    """Request rows int32[R, 5 + blocks] of a token axis without histories: they end where it begins."""
    return rows.at[:, HISTORY_START].set(-(-(-longest(rows) // align) * align))


def tiles(rows: jax.Array, *, align: int, first: int, last: int) -> Tiles:
    """Describe the tiles of token rows [first, last).

    Args:
        rows: int32[R, 5 + blocks], the request rows of the packed layout; an unused row holds zeros.
        align: tile size; `first` and `last` are multiples of it.
    """
    start = jnp.arange(first, last, align, dtype=jnp.int32)
    lengths = rows[:, HISTORY_LENGTH:]

    def inside(begin: jax.Array, count: jax.Array) -> jax.Array:
        offset = start[:, None] - begin[None, :]
        return (offset >= 0) & (offset < count[None, :])

    history = inside(rows[:, HISTORY_START], longest(rows))
    either = history | inside(rows[:, CANDIDATE_START], rows[:, CANDIDATE_COUNT])
    request = jnp.argmax(either, axis=1).astype(jnp.int32)
    used = either.any(axis=1)
    return Tiles(
        start=start,
        request=request,
        history_start=jnp.where(used, rows[request, HISTORY_START], 0),
        history_length=jnp.where(used[:, None], lengths[request], 0),
        is_history=history.any(axis=1),
        scenario=jnp.where(used, rows[request, SCENARIO], 0),
    )


def owned(rows: jax.Array, tokens: int, *, align: int) -> jax.Array:
    """bool[blocks, tokens]: which token rows are a request's, of a history in that block or a candidate."""
    every = tiles(rows, align=align, first=0, last=tokens)
    offset = every.start[:, None] + jnp.arange(align, dtype=jnp.int32)
    own = rows[every.request]
    begin = jnp.where(every.is_history, own[:, HISTORY_START], own[:, CANDIDATE_START])
    candidates = own[:, CANDIDATE_COUNT][:, None]
    count = jnp.where(every.is_history[:, None], every.history_length, candidates)  # [tiles, blocks]
    position = (offset - begin[:, None])[None]
    return ((position >= 0) & (position < count.T[..., None])).reshape(count.shape[1], tokens)
