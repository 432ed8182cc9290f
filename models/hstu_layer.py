"""One HSTU layer in the three variants that share the name; docs/models.md, "HSTU"."""

from __future__ import annotations

import jax
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.layers import Attention, Weights, merge_heads
from flame_jax.models.params import Param, constant, normal
from flame_jax.pallas_kernels.gated_output.api import gated_output
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.pre_attention.api import pre_attention
from flame_jax.pallas_kernels.rows import Drop, keep


def hstu_layer(
    x: jax.Array,
    weights: Weights,
    layer: int,
    attention: Attention,
    *,
    config: ModelConfig,
    first: int = 0,
    drop: Drop = keep,
    kernels: Kernels = REFERENCE,
) -> jax.Array:
    """One layer of the configured variant.

    Args:
        x: [..., n, D].
        weights: those of `layer_weights`, with a leading axis [layers].
        layer: which of them.
        attention: (q [..., n - first, H, dqk], k [..., n, H, dqk], v [..., n, H, dv]) -> [..., n - first, H, dv].
        first: rows before it serve as keys only and are not computed.
        kernels: implementation of each operation.

    Returns:
        [..., n - first, D].
    """
    variant = config.hstu.variant
    epsilon = 1e-5 if variant == "recsys_examples" else 1e-6
    u, *qkv = pre_attention(
        x,
        weights,
        layer,
        sizes=column_sizes(config),
        gate_only=variant == "dlrm_v3",
        epsilon=epsilon,
        implementation=kernels.pre_attention,
    )
    v, q, k = (y.reshape(*y.shape[:-1], config.heads, -1) for y in qkv)
    o = merge_heads(attention(q[..., first:, :, :], k, v))
    return gated_output(
        o, u, x, weights, layer, epsilon=epsilon, first=first, drop=drop, implementation=kernels.gated_output
    )


def column_sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    """Columns of u, v, q and k."""
    values, keys = config.heads * config.hstu.value_dim, config.heads * config.head_dim
    return values, values, keys, keys


def layer_weights(rngs: nnx.Rngs, config: ModelConfig) -> nnx.Dict[Param]:
    """The stacked layers' weights, with a leading axis [layers]."""
    stack, d, hstu = config.layers, config.width, config.hstu
    values, mixed = config.heads * hstu.value_dim, sum(column_sizes(config))
    outputs = 3 * values if hstu.variant == "dlrm_v3" else values
    weights = nnx.Dict(
        uvqk_w=normal(rngs, (stack, d, mixed), d**-0.5), out_w=normal(rngs, (stack, outputs, d), outputs**-0.5)
    )
    if hstu.variant == "research":
        weights["out_b"] = constant((stack, d), 0.0)
        weights["pos"] = normal(rngs, (stack, 2 * hstu.bias_positions - 1), 0.02)
        weights["ts"] = normal(rngs, (stack, hstu.bias_buckets), 0.02)
    else:
        weights["uvqk_b"] = constant((stack, mixed), 0.0)
        weights["input_scale"], weights["input_shift"] = constant((stack, d), 1.0), constant((stack, d), 0.0)
        weights["output_scale"] = constant((stack, values), 1.0)
        weights["output_shift"] = constant((stack, values), 0.0)
    return weights
