"""The public entry of the row-wise rest of a post-norm layer."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from flame_jax.pallas_kernels.kernels import Implementation
from flame_jax.pallas_kernels.post_attention import reference
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.rows import Drop, keep, linear, thirds


def post_attention(
    attended: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    *,
    following: Projection | None = None,
    drop: Drop = keep,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, ...]:
    """Output projection, residual, norm, FFN, residual, norm; then the following layer's q, k and v, if there is one.

    Args:
        attended: [blocks, n, inner], the heads' outputs side by side.
        x: [blocks, n, d], the layer's input.
        weights: name -> [layers, blocks or 1, ...]: out, ffn1, ffn2 with `_w` and `_b`, norm1 and norm2 with `_scale`
            and `_shift`.
        layer: which of them.
        drop: dropout on the projection's and the FFN's output when training.
        implementation: `mosaic` needs a Hopper GPU and `mosaic.misfit` to find nothing.

    Returns:
        The layer's output [blocks, n, d], and q, k, v of the layer after it, [blocks, n, inner] each; output and q
        without the rows before `following.first`.

    Raises:
        ValueError: the implementation can't do this.
    """
    if implementation == "mosaic":
        from flame_jax.pallas_kernels.post_attention import mosaic

        if drop is not keep:
            raise ValueError("the mosaic implementation has no dropout")
        return mosaic.post_attention(attended, x, weights, layer, following)
    one = {name: weight[layer] for name, weight in weights.items()}
    x = reference.post_attention(attended, x, one, drop=drop)
    if following is None:
        return (x,)
    q, k, v = thirds(linear(x, following.weight[following.layer], following.bias[following.layer]))
    return x[:, following.first :], q[:, following.first :], k, v
