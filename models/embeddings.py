"""Token embeddings that every ranker shares: item and action, and the candidates' side features."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.models.params import Param, normal
from flame_jax.packing import feature_field
from flame_jax.pallas_kernels.segments import Tiles
from flame_jax.schema import Feature, FeatureSchema

EMBEDDING_SCALE = 0.05


def schema_features(schema: FeatureSchema) -> Iterator[tuple[str, Feature]]:
    """Every side feature with its group, in slot order."""
    for group in ("item", "user", "context"):
        for feature in getattr(schema, f"{group}_features"):
            yield group, feature


def feature_tables(rngs: nnx.Rngs, schema: FeatureSchema, width: int) -> nnx.Dict[Param]:
    """One table per side feature: [size, d], [1, d] for a numeric one."""
    return nnx.Dict(
        {
            feature_field(group, f): normal(rngs, (1 if f.kind == "numeric" else f.size, width), EMBEDDING_SCALE)
            for group, f in schema_features(schema)
        }
    )


def embed_tokens(
    item: Param,
    action: Param,
    features: nnx.Dict[Param],
    schema: FeatureSchema,
    packed: dict[str, jax.Array],
    tail: Tiles,
    align: int,
) -> jax.Array:
    """Token embeddings of a packed batch (docs/models.md, "Tokens"); side features join the candidates only.

    Args:
        tail: tiles of the candidate rows, the last rows of the token axis.

    Returns:
        float32[blocks, T, d].
    """
    x = _rows_or_none(item[...], packed["item"], schema) + _rows_or_none(action[...], packed["action"], schema)
    candidates = len(tail.start) * align
    extra = jnp.zeros((candidates, x.shape[-1]), x.dtype)
    request = jnp.repeat(tail.request, align, total_repeat_length=candidates)
    for group, feature in schema_features(schema):
        name = feature_field(group, feature)
        embedded = embed_feature(feature, features[name][...], packed[name])
        extra += embedded if group == "item" else embedded[request]
    is_history = jnp.repeat(tail.is_history, align, total_repeat_length=candidates)
    extra = jnp.where(is_history[:, None], 0.0, extra)
    return x.at[:, x.shape[1] - candidates :].add(extra)


def _rows_or_none(table: jax.Array, rows: jax.Array, schema: FeatureSchema) -> jax.Array:
    """table[rows]; where events are interleaved, row -1 stands for nothing and embeds as zeros."""
    if not schema.interleave:
        return table[rows]
    return jnp.where(rows[..., None] < 0, 0.0, table[jnp.maximum(rows, 0)])


def embed_feature(feature: Feature, table: jax.Array, value: jax.Array) -> jax.Array:
    """Embed one side feature.

    Args:
        table: [size, d]; [1, d] for a numeric feature.
        value: [n], int32, or float32 for a numeric feature.

    Returns:
        [n, d] in the table's dtype.
    """
    if feature.kind == "categorical":
        return table[value]
    if feature.kind == "bits":
        bits = (value[:, None] >> jnp.arange(feature.size, dtype=jnp.int32)) & 1
        return bits.astype(table.dtype) @ table
    return value[:, None].astype(table.dtype) * table
