"""The row-wise part of an HSTU layer after its attention in plain jax.numpy."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels.rows import Drop, keep, layer_norm, normalise


def gated_output(
    o: jax.Array,
    u: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    epsilon: float,
    drop: Drop = keep,
) -> jax.Array:
    """Norm, gate, product, residual (docs/models.md, "HSTU").

    Args:
        o: [..., n, values], the heads' outputs side by side.
        u: [..., n, values].
        x: [..., n, D].
        weights: one layer's, by name.
        drop: dropout on what is added to x when training.

    Returns:
        [..., n, D].
    """
    if "output_scale" in weights:
        gated = u * layer_norm(o, weights["output_scale"], weights["output_shift"], epsilon)
    else:
        gated = u * normalise(o, epsilon).astype(x.dtype)
    if weights["out_w"].shape[-2] != o.shape[-1]:
        gated = jnp.concatenate([u, o, gated], axis=-1)
    y = gated @ weights["out_w"].astype(x.dtype)
    if "out_b" in weights:
        y = y + weights["out_b"].astype(x.dtype)
    return x + drop(y)
