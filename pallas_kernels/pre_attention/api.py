"""The public entry of the row-wise part of an HSTU layer before its attention."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from flame_jax.pallas_kernels.kernels import Implementation
from flame_jax.pallas_kernels.pre_attention import reference


def pre_attention(
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    *,
    sizes: tuple[int, int, int, int],
    gate_only: bool,
    epsilon: float,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, ...]:
    """Norm, product, SiLU, cut into u, v, q and k.

    Args:
        x: [..., n, D]; [blocks, n, D] for `mosaic`.
        weights: name -> [layers, ...]: `uvqk_w` [D, sum of sizes] and, unless the norm has no weights, `uvqk_b`,
            `input_scale` and `input_shift`.
        layer: which of them.
        sizes: columns of u, v, q and k.
        gate_only: SiLU of u alone, not of all four.
        epsilon: of the norm.
        implementation: `mosaic` needs a Hopper GPU and `mosaic.misfit` to find nothing.

    Returns:
        u, v, q and k, [..., n, size] each, in x's dtype.

    Raises:
        ValueError: the implementation can't do this.
    """
    if implementation == "mosaic":
        from flame_jax.pallas_kernels.pre_attention import mosaic

        return mosaic.pre_attention(x, weights, layer, sizes=sizes, gate_only=gate_only, epsilon=epsilon)
    own = ("uvqk_w", "uvqk_b", "input_scale", "input_shift")
    one = {name: weights[name][layer] for name in own if name in weights}
    return reference.pre_attention(x, one, sizes=sizes, gate_only=gate_only, epsilon=epsilon)
