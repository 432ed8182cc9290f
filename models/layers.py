"""What layers share: heads, side by side or apart."""

from __future__ import annotations

from collections.abc import Callable

import jax

from flame_jax.pallas_kernels.rows import thirds

Weights = dict[str, jax.Array]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def split_heads(x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., 3 * heads * head_dim] -> q, k, v of [..., heads, head_dim]."""
    q, k, v = thirds(x)
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., heads, head_dim] -> [..., heads * head_dim]."""
    return x.reshape(*x.shape[:-2], -1)
