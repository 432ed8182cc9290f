"""Histories cut into pages that lie in any order in a pool with room to spare, poison wherever no history is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 128
"""Of a page."""
POISON = -1
"""For times; keys and values are NaN."""


def page_table(lengths: np.ndarray, width: int, pages: int, random: np.random.Generator) -> np.ndarray:
    """int32[R, width]: every request's own pages; entries that its history does not reach are any page.

    Args:
        lengths: int[R], rows of the longest block's history.
        pages: of the pool.
    """
    table = random.integers(0, pages, (len(lengths), width)).astype(np.int32)
    free = random.permutation(pages).tolist()
    for own, length in zip(table, lengths, strict=True):
        needed = -(-int(length) // ROWS)
        own[:needed] = [free.pop() for _ in range(needed)]
    return table


def cut(dense: jax.Array, lengths: jax.Array, table: jax.Array, pages: int) -> jax.Array:
    """[blocks, pages, ROWS, ...] of histories dense [blocks, R, rows, ...] with lengths int[R, blocks]."""
    blocks, requests, rows = dense.shape[:3]
    room = table.shape[1] * ROWS
    width = [(0, 0), (0, 0), (0, max(room - rows, 0)), *[(0, 0)] * (dense.ndim - 3)]
    position = jnp.arange(room).reshape(-1, *[1] * (dense.ndim - 3))
    held = position < lengths.T.reshape(blocks, requests, *[1] * (dense.ndim - 2))
    poison = jnp.nan if jnp.issubdtype(dense.dtype, jnp.floating) else POISON
    filled = jnp.where(held, jnp.pad(dense, width)[:, :, :room], jnp.asarray(poison, dense.dtype))
    needed = jnp.arange(table.shape[1]) * ROWS < lengths.max(axis=1, keepdims=True)
    pool = jnp.full((blocks, pages, ROWS, *dense.shape[3:]), poison, dense.dtype)
    cut = filled.reshape(blocks, requests, table.shape[1], ROWS, *dense.shape[3:])
    return pool.at[:, jnp.where(needed, table, pages)].set(cut, mode="drop")
