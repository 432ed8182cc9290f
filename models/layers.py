"""Pieces that rankers share: LayerNorm, linear maps, and the post-norm transformer layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

EPSILON = 1e-6

Weights = dict[str, jax.Array]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Drop = Callable[[jax.Array], jax.Array]


def keep(x: jax.Array) -> jax.Array:
    """No dropout."""
    return x


def normalise(x: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """LayerNorm over the last axis without weights: float32, whatever x is."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)


def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """LayerNorm over the last axis, in float32, back in x's dtype. x [..., n, d]; scale, shift [..., d]."""
    return (normalise(x, epsilon) * scale[..., None, :] + shift[..., None, :]).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., n, i] @ weight [..., i, o] + bias [..., o], in x's dtype."""
    return x @ weight.astype(x.dtype) + bias.astype(x.dtype)[..., None, :]


def split_heads(x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., 3 * heads * head_dim] -> q, k, v of [..., heads, head_dim]."""
    q, k, v = jnp.split(x, 3, axis=-1)
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., heads, head_dim] -> [..., heads * head_dim]."""
    return x.reshape(*x.shape[:-2], -1)


def post_norm_layer(
    x: jax.Array, weights: Weights, attention: Attention, *, heads: int, first: int = 0, drop: Drop = keep
) -> jax.Array:
    """Transformer layer with a norm after each residual, and ReLU (docs/models.md, Climber's "Layer").

    Args:
        x: [..., n, d].
        attention: (q [..., n - first, H, h], k, v [..., n, H, h]) -> [..., n - first, H, h].
        first: rows before it serve as keys only and are not computed.
        drop: dropout on the attention's and the FFN's output when training.

    Returns:
        [..., n - first, d].
    """
    q, k, v = split_heads(linear(x, weights["qkv_w"], weights["qkv_b"]), heads)
    x = x[..., first:, :]
    mixed = linear(merge_heads(attention(q[..., first:, :, :], k, v)), weights["out_w"], weights["out_b"])
    x = layer_norm(x + drop(mixed), weights["norm1_scale"], weights["norm1_shift"])
    hidden = jax.nn.relu(linear(x, weights["ffn1_w"], weights["ffn1_b"]))
    hidden = linear(hidden, weights["ffn2_w"], weights["ffn2_b"])
    return layer_norm(x + drop(hidden), weights["norm2_scale"], weights["norm2_shift"])
