"""Row-wise pieces that layers and kernels' references share: LayerNorm, linear maps, dropout."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

EPSILON = 1e-6

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


def wide_linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """The same in float32, not rounded: XLA adds the bias, and rounds what follows, in the product's own kernel."""
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32) + bias[..., None, :]


def thirds(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[..., 3 * n] -> q, k, v of [..., n]."""
    q, k, v = jnp.split(qkv, 3, axis=-1)
    return q, k, v
