"""Pieces that rankers share: heads, and the post-norm transformer layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels.post_attention.reference import post_attention
from flame_jax.pallas_kernels.rows import Drop, keep, linear

Weights = dict[str, jax.Array]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def split_heads(x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., 3 * heads * head_dim] -> q, k, v of [..., heads, head_dim]."""
    q, k, v = jnp.split(x, 3, axis=-1)
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., heads, head_dim] -> [..., heads * head_dim]."""
    return x.reshape(*x.shape[:-2], -1)


def post_norm_layer(
    x: jax.Array, weights: Weights, attention: Attention, *, heads: int, drop: Drop = keep
) -> jax.Array:
    """Transformer layer with a norm after each residual, and ReLU (docs/models.md, Climber's "Layer").

    Args:
        x: [..., n, d].
        attention: (q, k, v [..., n, H, h]) -> [..., n, H, h].
        drop: dropout on the attention's and the FFN's output when training.

    Returns:
        [..., n, d].
    """
    q, k, v = split_heads(linear(x, weights["qkv_w"], weights["qkv_b"]), heads)
    return post_attention(merge_heads(attention(q, k, v)), x, weights, drop=drop)
