"""Random requests of a schema, packed into slots the way the server packs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flame_jax.host_table import host_table
from flame_jax.packing import Bucket, Layout, Place, place, slot_layout
from flame_jax.record import BlockEvents, Piece, RecordLayout
from flame_jax.schema import Feature, FeatureSchema
from tests.oracles.climber import OracleRequest

EPOCH = 900_000_000


@dataclass(frozen=True)
class Packed:
    """A filled slot and where each request went."""

    words: np.ndarray
    fields: dict[str, np.ndarray]
    places: list[Place]


def random_column(feature: Feature, count: int, random: np.random.Generator) -> np.ndarray:
    if feature.kind == "numeric":
        return random.normal(size=count).astype(np.float32)
    return random.integers(0, feature.limit, count).astype(np.int32)


def random_request(
    schema: FeatureSchema, random: np.random.Generator, *, lengths: list[int], candidates: int, rows: int
) -> OracleRequest:
    """A request with `lengths[b]` events in block b."""
    blocks = []
    for length in lengths:
        times = EPOCH + np.sort(random.integers(0, 10**7, length)).astype(np.int32)
        blocks.append((random.integers(0, rows, length), random.integers(0, schema.actions, length), times))
    return OracleRequest(
        blocks=blocks,
        request_time=EPOCH + 10**7 + int(random.integers(0, 10**6)),
        scenario=int(random.integers(len(schema.scenarios))),
        candidates=random.integers(0, rows, candidates),
        item_features={f.name: random_column(f, candidates, random) for f in schema.item_features},
        user_features={f.name: random_column(f, 1, random)[0] for f in schema.user_features},
        context_features={f.name: random_column(f, 1, random)[0] for f in schema.context_features},
    )


def encode(schema: FeatureSchema, request: OracleRequest) -> np.ndarray:
    """The request's record."""
    scalars = [np.asarray(request.user_features[f.name], f.dtype) for f in schema.user_features]
    scalars += [np.asarray(request.context_features[f.name], f.dtype) for f in schema.context_features]
    return RecordLayout(schema).encode(
        scenario=request.scenario,
        request_time=request.request_time,
        request_words=np.array([s.view(np.int32) for s in scalars], np.int32),
        blocks=[BlockEvents(*(np.asarray(c, np.int32) for c in block)) for block in request.blocks],
        candidates=np.asarray(request.candidates, np.int32),
        item_columns=[
            np.asarray(request.item_features[f.name], f.dtype).view(np.int32)
            for f in schema.item_features
            if f.source != "table"
        ],
    )


def pack(
    schema: FeatureSchema,
    layout: Layout,
    bucket: Bucket,
    requests: list[OracleRequest],
    *,
    dirt: np.random.Generator | None = None,
    item_table: np.ndarray | None = None,
    hot: bool = False,
    places: np.ndarray | None = None,
) -> Packed:
    """Fill a slot; with `dirt`, token rows hold an earlier batch's leftovers first; see `slot_layout` for `hot`."""
    words_of_row = 0 if item_table is None else item_table.shape[1]
    slot = slot_layout(schema, layout, bucket, host_words=words_of_row, hot=hot)
    words = np.zeros(slot.words, np.int32)
    fields = slot.views(words)
    if dirt is not None:
        for name, limit in (("item", 2), ("action", schema.actions + 1), ("time", 2**31 - 1)):
            fields[name][:] = dirt.integers(0, limit, fields[name].shape)
    records = RecordLayout(schema, host_table(item_table))
    encoded = [encode(schema, r) for r in requests]
    extents = [records.extent(record) for record in encoded]
    wheres = place(extents, bucket, layout)
    pieces = [Piece(record, 0, extent.candidates) for record, extent in zip(encoded, extents, strict=True)]
    records.fill(fields, pieces, bucket, layout, places)
    return Packed(words, fields, wheres)
