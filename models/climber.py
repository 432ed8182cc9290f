"""Climber (reconstruction), arXiv 2502.09888; docs/models.md states it as formulas."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.layers import Weights, merge_heads
from flame_jax.models.params import Param, constant, normal
from flame_jax.models.ranker import Packed, Ranker
from flame_jax.pallas_kernels.layer_stack.api import layer_stack
from flame_jax.pallas_kernels.post_attention.api import post_attention
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.rows import Drop, wide_linear
from flame_jax.schema import FeatureSchema


class Climber(Ranker):
    """One stack of adaptive layers per block, fused by bit-wise gating."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        blocks, scenarios = len(schema.blocks), len(schema.scenarios)
        bits = blocks * config.width
        super().__init__(config, schema, vocabulary, bits, rngs=rngs)
        adaptive = config.climber.adaptive
        self.layers = layer_weights(rngs, config, (config.layers, blocks))
        if adaptive:
            stack = (config.layers, blocks, scenarios, config.heads)
            self.layers["temperature"] = constant(stack, initial_temperature(config))
            self.layers["bias"] = constant((*stack, 3), 0.0)
        if config.climber.fusion:
            self.fusion = layer_weights(rngs, config, ())
            if adaptive:
                self.fusion["temperature"] = constant((scenarios, config.heads), initial_temperature(config))
            squeezed = max(1, bits // config.climber.gate_reduction)
            self.gate = nnx.Dict(
                squeeze_w=normal(rngs, (bits, squeezed), bits**-0.5),
                squeeze_b=constant((squeezed,), 0.0),
                excite_w=normal(rngs, (squeezed, bits), squeezed**-0.5),
                excite_b=constant((bits,), 0.0),
            )

    def represent(self, x: jax.Array, packed: Packed, drop: Drop) -> jax.Array:
        """[blocks, T, d] -> [C, blocks * d]."""
        stack = {name: leaf[...] for name, leaf in self.layers.items()}
        fusion = {name: leaf[...] for name, leaf in self.fusion.items()} if self.config.climber.fusion else None
        x, *qkv = layer_stack(
            x,
            {name: weight for name, weight in stack.items() if name not in ("temperature", "bias")},
            packed.rows,
            packed.time,
            temperature=self._temperature(stack, (self.config.layers, len(self.schema.blocks))),
            coefficients=stack.get("bias"),
            following=None if fusion is None else _only(fusion),
            first_candidate=packed.first_candidate,
            align=packed.align,
            window=packed.window,
            tiles_at_once=packed.tiles_at_once,
            drop=drop,
            kernels=packed.kernels,
        )
        return _side_by_side(x) if fusion is None else self._gated(self._fuse(x, qkv, fusion, packed, drop))

    def _temperature(self, weights: Weights, stack: tuple[int, ...]) -> jax.Array:
        """float32[*stack, scenarios, heads]."""
        if "temperature" in weights:
            return jax.nn.softplus(weights["temperature"])
        return jnp.full((*stack, len(self.schema.scenarios), self.config.heads), self.config.head_dim**0.5)

    def _fuse(self, x: jax.Array, qkv: list[jax.Array], fusion: Weights, packed: Packed, drop: Drop) -> jax.Array:
        """A layer in which the blocks of a candidate attend to one another: [blocks, C, d] -> the same."""
        q, k, v = (y.reshape(*y.shape[:-1], self.config.heads, -1).astype(jnp.float32) for y in qkv)
        k, v = (jnp.moveaxis(y, 0, -2) for y in (k, v))  # [C, H, blocks, h]
        temperature = packed.per_candidate(self._temperature(fusion, ())[packed.tail.scenario])
        # Blocks are few: sums of products, where a matrix product would be a tiny one per candidate and head. Sums over
        # the last axis, so that XLA makes one kernel of all this.
        logits = (q[..., None, :] * k).sum(axis=-1) / temperature[..., None]
        shares = jax.nn.softmax(logits, axis=-1)
        attended = merge_heads((shares[..., None] * v).sum(axis=-2)).astype(x.dtype)
        rows = {name: weight[None, None] for name, weight in fusion.items() if name != "temperature"}
        (x,) = post_attention(attended, x, rows, 0, drop=drop, implementation=packed.kernels.post_attention)
        return x

    def _gated(self, x: jax.Array) -> jax.Array:
        """Bit-wise gating: [blocks, C, d] -> [C, blocks * d]."""
        gate = {name: leaf[...] for name, leaf in self.gate.items()}
        # Block by block: a product over all bits would want them copied side by side.
        squeeze = gate["squeeze_w"].reshape(len(x), x.shape[-1], -1).astype(x.dtype)
        squeezed = jnp.matmul(x, squeeze, preferred_element_type=jnp.float32).sum(axis=0)
        squeezed = jax.nn.relu(squeezed + gate["squeeze_b"]).astype(x.dtype)
        excited = wide_linear(squeezed, gate["excite_w"], gate["excite_b"])
        return _side_by_side(x) * jax.nn.sigmoid(excited).astype(x.dtype)


def _side_by_side(x: jax.Array) -> jax.Array:
    """[blocks, n, d] -> [n, blocks * d]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def _only(fusion: Weights) -> Projection:
    """q, k and v of a layer that all blocks share."""
    return Projection(fusion["qkv_w"][None, None], fusion["qkv_b"][None, None], 0)


def initial_temperature(config: ModelConfig) -> float:
    """softplus of it is sqrt(head_dim)."""
    return float(np.log(np.expm1(np.sqrt(config.head_dim))))


def layer_weights(rngs: nnx.Rngs, config: ModelConfig, stack: tuple[int, ...]) -> nnx.Dict[Param]:
    """A transformer layer's weights with leading axes `stack`."""
    d, inner, ffn = config.width, config.heads * config.head_dim, config.ffn
    make = partial(normal, rngs)
    return nnx.Dict(
        qkv_w=make((*stack, d, 3 * inner), d**-0.5),
        qkv_b=constant((*stack, 3 * inner), 0.0),
        out_w=make((*stack, inner, d), inner**-0.5),
        out_b=constant((*stack, d), 0.0),
        norm1_scale=constant((*stack, d), 1.0),
        norm1_shift=constant((*stack, d), 0.0),
        ffn1_w=make((*stack, d, ffn), d**-0.5),
        ffn1_b=constant((*stack, ffn), 0.0),
        ffn2_w=make((*stack, ffn, d), ffn**-0.5),
        ffn2_b=constant((*stack, d), 0.0),
        norm2_scale=constant((*stack, d), 1.0),
        norm2_shift=constant((*stack, d), 0.0),
    )
