"""A plain pre-norm transformer with the rankers' mask: the honest baseline. docs/models.md, "Transformer"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.climber import layer_weights
from flame_jax.models.layers import merge_heads, split_heads
from flame_jax.models.one_block import OneBlockRanker
from flame_jax.models.ranker import Packed
from flame_jax.pallas_kernels.rows import Drop, layer_norm, linear
from flame_jax.pallas_kernels.sumi_attention.types import Softmax
from flame_jax.schema import FeatureSchema


class Transformer(OneBlockRanker):
    """Softmax attention, GELU, learned positions counted from the newest event."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, schema, vocabulary, rngs=rngs)
        self.layers = layer_weights(rngs, config, (config.layers,))

    def represent(self, x: jax.Array, packed: Packed, drop: Drop) -> jax.Array:
        """[1, T, d] -> [C, d]."""
        config = self.config
        x = self.add_positions(x, packed)
        temperature = jnp.full((1, len(self.schema.scenarios), config.heads), config.head_dim**0.5)
        attention = packed.attention(Softmax(temperature))
        for index in range(config.layers):
            w = {name: leaf[...][index] for name, leaf in self.layers.items()}
            first = packed.first_candidate if index == config.layers - 1 else 0
            h = layer_norm(x, w["norm1_scale"], w["norm1_shift"])
            q, k, v = split_heads(linear(h, w["qkv_w"], w["qkv_b"]), config.heads)
            x = x[:, first:]
            x = x + drop(linear(merge_heads(attention(q[:, first:], k, v)), w["out_w"], w["out_b"]))
            h = layer_norm(x, w["norm2_scale"], w["norm2_shift"])
            h = jax.nn.gelu(linear(h, w["ffn1_w"], w["ffn1_b"]), approximate=False)
            x = x + drop(linear(h, w["ffn2_w"], w["ffn2_b"]))
        return self.finish(x, packed)
