"""A plain pre-norm transformer with the rankers' mask: the honest baseline. docs/models.md, "Transformer"."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.climber import layer_weights
from flame_jax.models.embeddings import EMBEDDING_SCALE
from flame_jax.models.layers import Drop, layer_norm, linear, merge_heads, split_heads
from flame_jax.models.params import constant, normal
from flame_jax.models.positions import one_block, reversed_positions
from flame_jax.models.ranker import Packed, Ranker
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Softmax
from flame_jax.schema import FeatureSchema


class Transformer(Ranker):
    """Softmax attention, GELU, learned positions counted from the newest event.

    Raises:
        ValueError: the schema has more than one block.
    """

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        one_block(schema, "transformer")
        super().__init__(config, schema, vocabulary, config.width, rngs=rngs)
        if config.position_rows:
            self.position = normal(rngs, (config.position_rows, config.width), EMBEDDING_SCALE)
        self.layers = layer_weights(rngs, config, (config.layers,))
        self.final_scale, self.final_shift = constant((config.width,), 1.0), constant((config.width,), 0.0)

    def represent(self, x: jax.Array, packed: Packed, drop: Drop) -> jax.Array:
        """[1, T, d] -> [C, d]."""
        config = self.config
        if config.position_rows:
            table = self.position[...].astype(x.dtype)
            x = x + table[jnp.minimum(reversed_positions(packed), config.position_rows - 1)]
        temperature = jnp.full((1, len(self.schema.scenarios), config.heads), config.head_dim**0.5)
        attention = partial(
            sumi_attention,
            rows=packed.rows,
            time=packed.time,
            activation=Softmax(temperature),
            align=packed.align,
            window=packed.window,
        )
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
        return layer_norm(x[0, -packed.candidates :], self.final_scale[...], self.final_shift[...])
