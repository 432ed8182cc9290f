"""The row-wise rest of a post-norm layer in plain jax.numpy."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from flame_jax.pallas_kernels.rows import Drop, keep, layer_norm, linear


def post_attention(
    attended: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    drop: Drop = keep,
) -> jax.Array:
    """Output projection, residual, norm; FFN with ReLU, residual, norm (docs/models.md, Climber's "Layer").

    Args:
        attended: [..., n, inner], the heads' outputs side by side.
        x: [..., n, d], the layer's input.
        weights: one layer's, by name.
        drop: dropout on the projection's and the FFN's output when training.

    Returns:
        [..., n, d].
    """
    mixed = linear(attended, weights["out_w"], weights["out_b"])
    x = layer_norm(x + drop(mixed), weights["norm1_scale"], weights["norm1_shift"])
    hidden = jax.nn.relu(linear(x, weights["ffn1_w"], weights["ffn1_b"]))
    hidden = linear(hidden, weights["ffn2_w"], weights["ffn2_b"])
    return layer_norm(x + drop(hidden), weights["norm2_scale"], weights["norm2_shift"])
