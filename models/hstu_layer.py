"""One HSTU layer in the three variants that share the name; docs/models.md, "HSTU"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.layers import Attention, Weights, merge_heads
from flame_jax.models.params import Param, constant, normal
from flame_jax.pallas_kernels.rows import Drop, keep, layer_norm, normalise


def hstu_layer(
    x: jax.Array, weights: Weights, attention: Attention, *, config: ModelConfig, first: int = 0, drop: Drop = keep
) -> jax.Array:
    """One layer of the configured variant.

    Args:
        x: [..., n, D].
        attention: (q [..., n - first, H, dqk], k [..., n, H, dqk], v [..., n, H, dv]) -> [..., n - first, H, dv].
        first: rows before it serve as keys only and are not computed.

    Returns:
        [..., n - first, D].
    """
    variant, heads = config.hstu.variant, config.heads
    sizes = [heads * config.hstu.value_dim] * 2 + [heads * config.head_dim] * 2
    epsilon = 1e-5 if variant == "recsys_examples" else 1e-6
    if variant == "research":
        mixed = normalise(x, epsilon).astype(x.dtype) @ weights["uvqk_w"].astype(x.dtype)
    else:
        h = layer_norm(x, weights["input_scale"], weights["input_shift"], epsilon)
        mixed = h @ weights["uvqk_w"].astype(x.dtype) + weights["uvqk_b"].astype(x.dtype)
    if variant != "dlrm_v3":
        mixed = jax.nn.silu(mixed)
    u, v, q, k = jnp.split(mixed, [sum(sizes[:1]), sum(sizes[:2]), sum(sizes[:3])], axis=-1)
    if variant == "dlrm_v3":
        u = jax.nn.silu(u)
    u, x = u[..., first:, :], x[..., first:, :]
    shape = (*k.shape[:-1], heads, -1)
    q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
    o = merge_heads(attention(q[..., first:, :, :], k, v))
    if variant == "research":
        gated = u * normalise(o, epsilon).astype(x.dtype)
    else:
        gated = u * layer_norm(o, weights["output_scale"], weights["output_shift"], epsilon)
    if variant == "dlrm_v3":
        gated = jnp.concatenate([u, o, gated], axis=-1)
    y = gated @ weights["out_w"].astype(x.dtype)
    if variant == "research":
        y = y + weights["out_b"].astype(x.dtype)
    return x + drop(y)


def layer_weights(rngs: nnx.Rngs, config: ModelConfig) -> nnx.Dict[Param]:
    """The stacked layers' weights, with a leading axis [layers]."""
    stack, d, hstu = config.layers, config.width, config.hstu
    values = config.heads * hstu.value_dim
    mixed = 2 * (values + config.heads * config.head_dim)
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
