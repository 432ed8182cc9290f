"""Climber and HSTU (dlrm_v3) in plain JAX on regular batches, from ids to scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bench.baselines import attention as softmax
from bench.baselines import silu
from bench.baselines.weights import Climber, Layer
from flame_jax.config import ModelConfig
from flame_jax.models.heads import expert_head
from flame_jax.models.hstu import SECONDS_PER_STEP
from flame_jax.models.hstu_layer import hstu_layer
from flame_jax.models.layers import merge_heads, split_heads
from flame_jax.pallas_kernels.post_attention.reference import post_attention
from flame_jax.pallas_kernels.rows import layer_norm, linear
from flame_jax.pallas_kernels.time_buckets import sqrt_bucket

Batch = dict[str, jax.Array]
"""The arrays of `inputs.Regular` by name."""


def climber_rank(batch: Batch, stack: Climber, outer: Layer, config: ModelConfig, attend: softmax.Attention) -> Any:
    """Probabilities float32[B, c, tasks]."""
    x = embed(batch, outer, config)
    time, scenario = batch["times"], batch["scenario"]
    z = climber_stack(x, time, batch["request_time"], scenario, stack, heads=config.heads, attention=attend)
    y = fuse(jnp.moveaxis(z, 0, 2), scenario, outer, heads=config.heads)
    return scores(y, batch, outer)


def hstu_rank(batch: Batch, layers: list[Layer], outer: Layer, config: ModelConfig, attend: silu.Attention) -> Any:
    """Probabilities float32[B, c, tasks]."""
    x = encode(embed(batch, outer, config)[0], batch, outer, config)
    y = hstu_stack(x, layers, history=batch["times"].shape[2], config=config, attention=attend)
    return scores(layer_norm(y, outer["final_scale"], outer["final_shift"]), batch, outer)


def climber_stack(
    x: jax.Array,
    times: jax.Array,
    request_time: jax.Array,
    scenario: jax.Array,
    weights: Climber,
    *,
    heads: int,
    attention: softmax.Attention,
) -> jax.Array:
    """Climber's layers.

    Args:
        x: [blocks, B, h + c, d], history first.
        times: int32[blocks, B, h].
        request_time: int32[B].
        scenario: int32[B].

    Returns:
        [blocks, B, c, d].
    """
    blocks, requests, tokens, width = x.shape
    history = times.shape[2]
    distance, age = bias_logs(times, request_time, tokens, every_key=attention.every_key, dtype=x.dtype)
    inverse, coefficients = weights.inverse[:, :, scenario], weights.bias[:, :, scenario]
    for index, layer in enumerate(weights.layers):
        bias = softmax.Bias(distance, age, coefficients[index], inverse[index], history)
        rows = tokens
        qkv = linear(x.reshape(blocks, -1, width), layer["qkv_w"], layer["qkv_b"])
        q, k, v = jnp.split(qkv.reshape(blocks, requests, tokens, 3 * heads, -1), 3, axis=3)
        if index == len(weights.layers) - 1:
            rows = tokens - history
            bias, q, x = bias.last(rows), q[:, :, -rows:], x[:, :, -rows:]
        attended = merge_heads(attention(q, k, v, bias))
        x = post_attention(attended.reshape(blocks, requests * rows, -1), x.reshape(blocks, -1, width), layer)
        x = x.reshape(blocks, requests, rows, width)
    return x


def bias_logs(
    times: jax.Array, request_time: jax.Array, tokens: int, *, every_key: bool, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """`distance` and `age` of `attention.Bias` for all token rows, computed once and kept in `dtype`."""
    blocks, requests, history = times.shape
    asked = jnp.broadcast_to(request_time[:, None], (blocks, requests, tokens - history))
    time, position = jnp.concatenate([times, asked], axis=2), jnp.minimum(jnp.arange(tokens), history)
    keys = tokens if every_key else history

    def log2_distance(query: jax.Array, key: jax.Array) -> jax.Array:
        difference = jnp.abs(query[..., :, None] - key[..., None, :])
        return jnp.log2(1.0 + difference.astype(jnp.float32)).astype(dtype)

    logs = log2_distance(position, position[:keys]), log2_distance(time, time[..., :keys])
    # Without the barrier the compiler may compute them again in every layer.
    distance, age = jax.lax.optimization_barrier(logs)
    return distance, age


def hstu_stack(
    x: jax.Array, weights: list[Layer], *, history: int, config: ModelConfig, attention: silu.Attention
) -> jax.Array:
    """HSTU's layers: x [B, h + c, D], history first -> [B, c, D]."""
    form = silu.Silu(config.head_dim**-0.5, config.hstu.attention_divisor, history)
    for index, layer in enumerate(weights):
        first = history if index == len(weights) - 1 else 0
        stack = {name: weight[None] for name, weight in layer.items()}
        x = hstu_layer(x, stack, 0, lambda q, k, v: attention(q, k, v, form), config=config, first=first)
    return x


def hstu_stack_given(
    x: jax.Array,
    weights: list[Layer],
    history: list[tuple[jax.Array, jax.Array]],
    *,
    config: ModelConfig,
    attention: silu.Given,
) -> jax.Array:
    """HSTU's layers on candidates alone, x [B, c, D] -> [B, c, D]; k, v [B, h, heads, dim] of each layer's history."""
    form = silu.Silu(config.head_dim**-0.5, config.hstu.attention_divisor, history[0][0].shape[1])
    for layer, given in zip(weights, history, strict=True):
        stack = {name: weight[None] for name, weight in layer.items()}

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: tuple[jax.Array, jax.Array] = given) -> jax.Array:
            return attention(q, (k, v), given, form).astype(v.dtype)

        x = hstu_layer(x, stack, 0, attend, config=config)
    return x


def embed(batch: Batch, outer: Layer, config: ModelConfig) -> jax.Array:
    """[blocks, B, h + c, d] in the model's dtype."""
    rows: jax.Array = outer["item"][batch["items"]].astype(jnp.float32)
    rows += outer["action"][batch["actions"]].astype(jnp.float32)
    return rows.astype(jnp.dtype(config.dtype))


def encode(x: jax.Array, batch: Batch, outer: Layer, config: ModelConfig) -> jax.Array:
    """x [B, h + c, D] with DLRMv3's position and time tables, when there are any."""
    times, rows = batch["times"][0], x.shape[1]
    history = times.shape[1]
    if "position" in outer or "time" in outer:
        x = x * config.width**0.5
    if "position" in outer:
        row = jnp.minimum(jnp.maximum(history - jnp.arange(rows), 0), len(outer["position"]) - 1)
        x = x + outer["position"].astype(x.dtype)[row]
    if "time" in outer:
        seconds = jnp.maximum(batch["request_time"][:, None] - times, 0)
        row = jnp.pad(sqrt_bucket(seconds, SECONDS_PER_STEP, len(outer["time"])), ((0, 0), (0, rows - history)))
        x = x + outer["time"].astype(x.dtype)[row]
    return x


def fuse(z: jax.Array, scenario: jax.Array, outer: Layer, *, heads: int) -> jax.Array:
    """Climber's bit-wise gating fusion: z [B, c, blocks, d] -> [B, c, blocks * d]."""
    gate, fusion = outer["gate"], outer["fusion"]
    inverse = fusion["inverse"][scenario][:, None, :, None, None]

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.einsum("ncqhd,nckhd->nchqk", q, k, preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(logits * inverse, axis=-1).astype(v.dtype)
        return jnp.einsum("nchqk,nckhd->ncqhd", shares, v)

    q, k, v = split_heads(linear(z, fusion["qkv_w"], fusion["qkv_b"]), heads)
    bits = post_attention(merge_heads(attention(q, k, v)), z, fusion)
    bits = bits.reshape(*bits.shape[:2], -1)
    squeezed = jax.nn.relu(linear(bits, gate["squeeze_w"], gate["squeeze_b"]))
    gated: jax.Array = bits * jax.nn.sigmoid(linear(squeezed, gate["excite_w"], gate["excite_b"]))
    return gated


def scores(y: jax.Array, batch: Batch, outer: Layer) -> jax.Array:
    """y [B, c, m] -> probabilities float32[B, c, tasks]."""
    requests, candidates, width = y.shape
    logits = expert_head(outer["head"], y.reshape(-1, width)).reshape(requests, candidates, -1)
    return jax.nn.sigmoid(logits + outer["item_bias"][batch["items"][0, :, -candidates:]])
