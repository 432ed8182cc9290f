"""Pieces that rankers share: LayerNorm, the adaptive transformer layer, side-feature embeddings."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flame_jax.schema import Feature

EPSILON = 1e-6

Weights = dict[str, jax.Array]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, in float32, back in x's dtype. `scale`, `shift` broadcast against x."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + EPSILON) * scale + shift).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., n, i] @ weight [..., i, o] + bias [..., o], in x's dtype."""
    return x @ weight.astype(x.dtype) + bias.astype(x.dtype)[..., None, :]


def split_heads(x: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., 3 * heads * head_dim] -> q, k, v of [..., heads, head_dim]."""
    q, k, v = jnp.split(x, 3, axis=-1)
    shape = (*q.shape[:-1], heads, q.shape[-1] // heads)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def transformer_layer(
    x: jax.Array,
    weights: Weights,
    attention: Attention,
    *,
    heads: int,
    first: int = 0,
    drop: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Post-norm transformer layer (docs/models.md, "Layer").

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
    mixed = attention(q[..., first:, :, :], k, v)
    mixed = linear(mixed.reshape(*mixed.shape[:-2], -1), weights["out_w"], weights["out_b"])
    x = layer_norm(x + drop(mixed), weights["norm1_scale"][..., None, :], weights["norm1_shift"][..., None, :])
    hidden = jax.nn.relu(linear(x, weights["ffn1_w"], weights["ffn1_b"]))
    hidden = linear(hidden, weights["ffn2_w"], weights["ffn2_b"])
    return layer_norm(x + drop(hidden), weights["norm2_scale"][..., None, :], weights["norm2_shift"][..., None, :])


def embed_feature(feature: Feature, table: jax.Array, value: jax.Array) -> jax.Array:
    """Embed one side feature.

    Args:
        table: [size, d]; [1, d] for a numeric feature.
        value: [n], int32, or float32 for a numeric feature.

    Returns:
        [n, d] in the table's dtype.
    """
    if feature.kind == "categorical":
        return table[value]
    if feature.kind == "bits":
        bits = (value[:, None] >> jnp.arange(feature.size, dtype=jnp.int32)) & 1
        return bits.astype(table.dtype) @ table
    return value[:, None].astype(table.dtype) * table
