"""HSTU as a ranker; docs/models.md, "HSTU". `stack_from_meta` gives the public layers alone, as a function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.embeddings import EMBEDDING_SCALE
from flame_jax.models.hstu_layer import hstu_layer, layer_weights
from flame_jax.models.layers import Attention, Weights
from flame_jax.models.meta_stu import stack_from_meta
from flame_jax.models.one_block import OneBlockRanker
from flame_jax.models.params import normal
from flame_jax.models.positions import once_per_token, query_times
from flame_jax.models.ranker import Packed
from flame_jax.pallas_kernels.rows import Drop
from flame_jax.pallas_kernels.sumi_attention.types import Silu, TableBias
from flame_jax.pallas_kernels.time_buckets import sqrt_bucket
from flame_jax.schema import FeatureSchema

__all__ = ["Hstu", "stack_from_meta"]

SECONDS_PER_STEP = 60
"""The input's time table is read at sqrt(seconds / this) (DLRMv3)."""


class Hstu(OneBlockRanker):
    """Pointwise (SiLU) attention gated by u, causal history."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, schema, vocabulary, rngs=rngs)
        if config.hstu.time_rows:
            self.time = normal(rngs, (config.hstu.time_rows, config.width), EMBEDDING_SCALE)
        self.layers = layer_weights(rngs, config)

    def represent(self, x: jax.Array, packed: Packed, drop: Drop) -> jax.Array:
        """[1, T, d] -> [C, d]."""
        depth = self.config.layers
        weights = {name: leaf[...] for name, leaf in self.layers.items()}
        x = self._encode_input(x, packed)
        for index in range(depth):
            attention = self._attention(weights, index, packed)
            first = packed.first_candidate if index == depth - 1 else 0
            x = hstu_layer(
                x,
                weights,
                index,
                attention,
                config=self.config,
                first=first,
                drop=drop,
                kernels=packed.kernels,
            )
        return self.finish(x, packed)

    def _encode_input(self, x: jax.Array, packed: Packed) -> jax.Array:
        """DLRMv3's position and time-to-query tables, when there are any."""
        config = self.config
        if config.position_rows or config.hstu.time_rows:
            x = self.add_positions(x * config.width**0.5, packed)
        if config.hstu.time_rows:
            seconds = jnp.maximum(query_times(packed) - packed.time, 0)
            bucket = sqrt_bucket(seconds, SECONDS_PER_STEP, config.hstu.time_rows)
            x = x + self.time[...].astype(x.dtype)[once_per_token(bucket)]
        return x

    def _attention(self, weights: Weights, layer: int, packed: Packed) -> Attention:
        research = self.config.hstu.variant == "research"
        return packed.attention(
            Silu(1.0 if research else self.config.head_dim**-0.5, self.config.hstu.attention_divisor),
            bias=TableBias(weights["pos"][layer], weights["ts"][layer]) if research else None,
            causal=True,
        )
