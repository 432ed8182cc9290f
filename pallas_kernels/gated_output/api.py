"""The public entry of the row-wise part of an HSTU layer after its attention."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from flame_jax.pallas_kernels.gated_output import reference
from flame_jax.pallas_kernels.kernels import Implementation
from flame_jax.pallas_kernels.rows import Drop, keep


def gated_output(
    o: jax.Array,
    u: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    *,
    epsilon: float,
    first: int = 0,
    drop: Drop = keep,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Norm of o, gated by u; product; residual.

    Args:
        o: [..., n - first, values], the heads' outputs side by side; [blocks, n - first, values] for `mosaic`.
        u: [..., n, values].
        x: [..., n, D], the layer's input.
        weights: name -> [layers, ...]: `out_w` [values, D], or [3 * values, D] where u, o and the gated rows are
            multiplied side by side; unless the norm has no weights, `output_scale` and `output_shift`; `out_b` or not.
        layer: which of them.
        epsilon: of the norm.
        first: rows of u and x before it are not read.
        drop: dropout on what is added to x when training.
        implementation: `mosaic` needs a Hopper GPU and `mosaic.misfit` to find nothing.

    Returns:
        [..., n - first, D], in x's dtype.

    Raises:
        ValueError: the implementation can't do this.
    """
    if implementation == "mosaic":
        from flame_jax.pallas_kernels.gated_output import mosaic

        if drop is not keep:
            raise ValueError("the mosaic implementation has no dropout")
        return mosaic.gated_output(o, u, x, weights, layer, epsilon=epsilon, first=first)
    own = ("out_w", "out_b", "output_scale", "output_shift")
    one = {name: weights[name][layer] for name in own if name in weights}
    return reference.gated_output(o, u[..., first:, :], x[..., first:, :], one, epsilon=epsilon, drop=drop)
