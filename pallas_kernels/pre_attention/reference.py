"""The row-wise part of an HSTU layer before its attention in plain jax.numpy."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels.rows import layer_norm, normalise


def pre_attention(
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    sizes: tuple[int, int, int, int],
    gate_only: bool,
    epsilon: float,
) -> tuple[jax.Array, ...]:
    """Norm, product, SiLU, cut into u, v, q and k (docs/models.md, "HSTU").

    Args:
        x: [..., n, D].
        weights: one layer's, by name.
        sizes: columns of u, v, q and k.
        gate_only: SiLU of u alone, not of all four.

    Returns:
        u, v, q and k, [..., n, size] each.
    """
    if "input_scale" in weights:
        h = layer_norm(x, weights["input_scale"], weights["input_shift"], epsilon)
        mixed = h @ weights["uvqk_w"].astype(x.dtype) + weights["uvqk_b"].astype(x.dtype)
    else:
        mixed = normalise(x, epsilon).astype(x.dtype) @ weights["uvqk_w"].astype(x.dtype)
    if not gate_only:
        mixed = jax.nn.silu(mixed)
    u, v, q, k = jnp.split(mixed, [sum(sizes[:end]) for end in (1, 2, 3)], axis=-1)
    return (jax.nn.silu(u) if gate_only else u), v, q, k
