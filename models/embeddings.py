"""Token embeddings that every ranker shares: item and action, and the candidates' side features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.models.params import Column, Param, constant, normal
from flame_jax.pallas_kernels.segments import Tiles, per_row
from flame_jax.schema import Feature, FeatureSchema, feature_field

EMBEDDING_SCALE = 0.05


def feature_tables(rngs: nnx.Rngs, schema: FeatureSchema, width: int) -> nnx.Dict[Param]:
    """One embedding table per side feature, [rows, d] (see `Feature.rows`).

    Those of features that only a request brings begin with zeros: where training never sees a value, a value must not
    move the scores.
    """

    def table(group: str, feature: Feature) -> Param:
        shape = (feature.rows, width)
        return constant(shape, 0.0) if feature.source == "request" else normal(rngs, shape, EMBEDDING_SCALE)

    return nnx.Dict({feature_field(group, f): table(group, f) for group, f in schema.features})


def value_columns(schema: FeatureSchema, vocabulary: int) -> nnx.Dict[Column]:
    """Values by item row, [vocabulary], of each item feature whose source is `table`; zeros at first."""
    return nnx.Dict(
        {
            feature_field("item", f): Column(jnp.zeros(vocabulary, f.dtype))
            for f in schema.item_features
            if f.source == "table"
        }
    )


def embed_tokens(
    item: Param | None,
    action: Param,
    features: nnx.Dict[Param],
    columns: nnx.Dict[Column],
    schema: FeatureSchema,
    packed: dict[str, jax.Array],
    tail: Tiles,
    align: int,
) -> jax.Array:
    """Token embeddings of a packed batch (docs/models.md, "Tokens"); side features join the candidates only.

    Args:
        item: None where the table is in host memory and its rows came with the batch, or are held on the device.
        tail: tiles of the candidate rows, the last rows of the token axis.

    Returns:
        float32[blocks, T, d].
    """
    if item is None:
        x = brought_rows(packed["embedding"], action.shape[-1])
        if "hot" in packed:
            places = packed["hot"][..., None]
            held = packed["hot_rows"][jnp.maximum(packed["hot"], 0)].astype(jnp.float32)
            x = jnp.where(places < 0, x, held)
    else:
        x = _rows_or_none(item[...], packed["item"], schema)
    x += _rows_or_none(action[...], packed["action"], schema)
    if not schema.features:
        return x
    candidates = len(tail.start) * align
    extra = jnp.zeros((candidates, x.shape[-1]), x.dtype)
    request = per_row(tail.request, align)
    item_rows = candidate_items(packed, candidates)
    for group, feature in schema.features:
        name = feature_field(group, feature)
        values = columns[name][...][item_rows] if name in columns else packed[name]
        embedded = embed_feature(feature, features[name][...], values)
        extra += embedded if group == "item" else embedded[request]
    is_history = per_row(tail.is_history, align)
    extra = jnp.where(is_history[:, None], 0.0, extra)
    return x.at[:, x.shape[1] - candidates :].add(extra)


def candidate_items(packed: dict[str, jax.Array], candidates: int) -> jax.Array:
    """int32[candidates]: item rows of the candidate part of the token axis."""
    # Candidates have an item, but a row of the history that lies in the candidate part may have none.
    return jnp.maximum(packed["item"][0, -candidates:], 0)


def brought_rows(words: jax.Array, width: int) -> jax.Array:
    """float32[..., width] of the embeddings in int32[..., words]: float32, or two bfloat16 a word."""
    dtype = jnp.float32 if words.shape[-1] == width else jnp.bfloat16
    return jax.lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], width).astype(jnp.float32)


def _rows_or_none(table: jax.Array, rows: jax.Array, schema: FeatureSchema) -> jax.Array:
    """float32 table[rows]; where events are interleaved, row -1 stands for nothing and embeds as zeros."""
    if not schema.interleave:
        return table[rows].astype(jnp.float32)
    return jnp.where(rows[..., None] < 0, 0.0, table[jnp.maximum(rows, 0)].astype(jnp.float32))


def embed_feature(feature: Feature, table: jax.Array, value: jax.Array) -> jax.Array:
    """Embed one side feature.

    Args:
        table: [rows, d], float32 or bfloat16.
        value: [n], int32, or float32 for a numeric feature.

    Returns:
        float32[n, d].
    """
    if feature.kind in ("categorical", "id"):
        return table[value].astype(jnp.float32)
    table = table.astype(jnp.float32)
    if feature.kind == "bits":
        bits = (value[:, None] >> jnp.arange(feature.size, dtype=jnp.int32)) & 1
        return bits.astype(jnp.float32) @ table
    return value[:, None] * table
