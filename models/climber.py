"""Climber (reconstruction) on packed batches; docs/models.md states it as formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.layers import Weights, embed_feature, linear, transformer_layer
from flame_jax.packing import Layout, feature_field
from flame_jax.pallas_kernels.segments import Tiles, tiles
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.schema import Feature, FeatureSchema

Drop = Callable[[jax.Array], jax.Array]


def _keep(x: jax.Array) -> jax.Array:
    return x


def schema_features(schema: FeatureSchema) -> Iterator[tuple[str, Feature]]:
    """Every side feature with its group, in slot order."""
    for group in ("item", "user", "context"):
        for feature in getattr(schema, f"{group}_features"):
            yield group, feature


class Climber(nnx.Module):
    """Weights of a Climber and its forward pass over one packed batch.

    Args:
        vocabulary: item rows, the out-of-vocabulary row 0 included.
    """

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        self.config, self.schema = config, schema
        blocks, d, tasks = len(schema.blocks), config.width, len(schema.tasks)
        normal = partial(_normal, rngs)
        self.item = normal((vocabulary, d), 0.05)
        self.action = normal((schema.actions + 1, d), 0.05)
        self.item_bias = _constant((vocabulary, tasks), 0.0)
        self.features = nnx.Dict(
            {
                feature_field(group, f): normal((1 if f.kind == "numeric" else f.size, d), 0.05)
                for group, f in schema_features(schema)
            }
        )
        self.layers = _layer_weights(rngs, config, (config.layers, blocks), len(schema.scenarios), biased=True)
        self.fusion = _layer_weights(rngs, config, (), len(schema.scenarios), biased=False)
        bits = blocks * d
        squeezed = max(1, bits // config.gate_reduction)
        self.gate = nnx.Dict(
            squeeze_w=normal((bits, squeezed), bits**-0.5),
            squeeze_b=_constant((squeezed,), 0.0),
            excite_w=normal((squeezed, bits), squeezed**-0.5),
            excite_b=_constant((bits,), 0.0),
        )
        self.head = nnx.Dict(
            hidden_w=normal((bits, config.head_hidden), bits**-0.5),
            hidden_b=_constant((config.head_hidden,), 0.0),
            task_w=_constant((config.head_hidden, tasks), 0.0),
            task_b=_constant((tasks,), 0.0),
        )

    def __call__(
        self, packed: dict[str, jax.Array], *, layout: Layout, candidates: int, drop: Drop = _keep
    ) -> jax.Array:
        """Logits of the candidate rows of a packed batch.

        Args:
            packed: the fields of a slot, see `flame_jax.packing.slot_layout`.
            candidates: candidate rows of the bucket (C_max), the last rows of the token axis.
            drop: dropout, when training.

        Returns:
            float32[candidates, tasks]; rows without a candidate are finite and mean nothing.
        """
        rows, tokens = packed["rows"], packed["item"].shape[1]
        tail = tiles(rows, align=layout.align, first=tokens - candidates, last=tokens)
        x = drop(self._embed(packed, tail, candidates, layout.align))
        window = min(layout.aligned(self.schema.block_length), tokens)
        depth = self.config.layers
        for index in range(depth):
            weights = {name: leaf[...][index] for name, leaf in self.layers.items()}
            attention = partial(
                sumi_attention,
                rows=rows,
                time=packed["time"],
                temperature=jax.nn.softplus(weights["temperature"]),
                bias=weights["bias"],
                align=layout.align,
                window=window,
            )
            first = tokens - candidates if index == depth - 1 else 0
            x = transformer_layer(x, weights, attention, heads=self.config.heads, first=first, drop=drop)
        scenario = jnp.repeat(tail.scenario, layout.align, total_repeat_length=candidates)
        fused = self._fuse(jnp.moveaxis(x, 0, 1), scenario, drop)
        head = {name: leaf[...] for name, leaf in self.head.items()}
        hidden = jax.nn.relu(linear(fused, head["hidden_w"], head["hidden_b"]))
        logits = linear(hidden.astype(jnp.float32), head["task_w"], head["task_b"])
        return logits + self.item_bias[...][packed["item"][0, tokens - candidates :]]

    def _embed(self, packed: dict[str, jax.Array], tail: Tiles, candidates: int, align: int) -> jax.Array:
        """Token embeddings [blocks, T, d]; side features join the candidates only."""
        dtype = jnp.dtype(self.config.dtype)
        x = self.item[...][packed["item"]] + self.action[...][packed["action"]]
        extra = jnp.zeros((candidates, self.config.width), x.dtype)
        request = jnp.repeat(tail.request, align, total_repeat_length=candidates)
        for group, feature in schema_features(self.schema):
            name = feature_field(group, feature)
            embedded = embed_feature(feature, self.features[name][...], packed[name])
            extra += embedded if group == "item" else embedded[request]
        is_history = jnp.repeat(tail.is_history, align, total_repeat_length=candidates)
        extra = jnp.where(is_history[:, None], 0.0, extra)
        return x.at[:, x.shape[1] - candidates :].add(extra).astype(dtype)

    def _fuse(self, z: jax.Array, scenario: jax.Array, drop: Drop) -> jax.Array:
        """Bit-wise gating fusion: z [C, blocks, d], scenario int32[C] -> [C, blocks * d]."""
        weights: Weights = {name: leaf[...] for name, leaf in self.fusion.items()}
        temperature = jax.nn.softplus(weights["temperature"])[scenario]

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            logits = jnp.einsum("cqhd,ckhd->chqk", q, k, preferred_element_type=jnp.float32)
            shares = jax.nn.softmax(logits / temperature[:, :, None, None], axis=-1).astype(v.dtype)
            return jnp.einsum("chqk,ckhd->cqhd", shares, v)

        mixed = transformer_layer(z, weights, attention, heads=self.config.heads, drop=drop)
        bits = mixed.reshape(mixed.shape[0], -1)
        gate = {name: leaf[...] for name, leaf in self.gate.items()}
        squeezed = jax.nn.relu(linear(bits, gate["squeeze_w"], gate["squeeze_b"]))
        return bits * jax.nn.sigmoid(linear(squeezed, gate["excite_w"], gate["excite_b"]))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param[jax.Array]:
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * scale)


def _constant(shape: tuple[int, ...], value: float) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.full(shape, value, jnp.float32))


def _layer_weights(
    rngs: nnx.Rngs, config: ModelConfig, stack: tuple[int, ...], scenarios: int, *, biased: bool
) -> nnx.Dict[nnx.Param[jax.Array]]:
    """One adaptive layer's weights with leading axes `stack`. The temperature starts at sqrt(head_dim)."""
    d, inner, ffn = config.width, config.heads * config.head_dim, config.ffn
    normal = partial(_normal, rngs)
    weights = nnx.Dict(
        qkv_w=normal((*stack, d, 3 * inner), d**-0.5),
        qkv_b=_constant((*stack, 3 * inner), 0.0),
        out_w=normal((*stack, inner, d), inner**-0.5),
        out_b=_constant((*stack, d), 0.0),
        norm1_scale=_constant((*stack, d), 1.0),
        norm1_shift=_constant((*stack, d), 0.0),
        ffn1_w=normal((*stack, d, ffn), d**-0.5),
        ffn1_b=_constant((*stack, ffn), 0.0),
        ffn2_w=normal((*stack, ffn, d), ffn**-0.5),
        ffn2_b=_constant((*stack, d), 0.0),
        norm2_scale=_constant((*stack, d), 1.0),
        norm2_shift=_constant((*stack, d), 0.0),
        temperature=_constant((*stack, scenarios, config.heads), float(np.log(np.expm1(np.sqrt(config.head_dim))))),
    )
    if biased:
        weights["bias"] = _constant((*stack, scenarios, config.heads, 3), 0.0)
    return weights
