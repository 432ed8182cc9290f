"""Memory of the feature path: it does not grow with the requests that have been."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np

from flame_jax.feature_config import CacheConfig
from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.pda.staging import Slot
from flame_jax.record import Piece
from flame_jax.request import History, RankRequest
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary

EVENTS, CANDIDATES, ITEMS = 128, 64, 500
SCHEMA = FeatureSchema(
    actions=2,
    blocks=(Block("all"), Block("some", (1,))),
    block_length=EVENTS,
    item_features=(Feature("year", "numeric"),),
    user_features=(Feature("age", "categorical", 9),),
)
LAYOUT, BUCKET = Layout(align=8, max_requests=1), Bucket(EVENTS + CANDIDATES, CANDIDATES)
GROWTH = 64 << 10
"""Bytes that 10,000 requests may leave: less than one of their records each, by far."""


def write(folder: Path, random: np.random.Generator) -> None:
    rows = np.zeros(ITEMS, item_dtype(SCHEMA))
    rows["id"] = np.arange(ITEMS)
    history = History(
        random.integers(0, ITEMS, EVENTS), random.integers(0, 2, EVENTS).astype(np.int32), np.arange(EVENTS)
    )
    with LmdbWriter(folder, SCHEMA) as writer:
        writer.put_items(rows)
        writer.put_users((f"u{n}", history, feature_row(SCHEMA.user_features, {"age": 3})) for n in range(20))
        writer.finish("memory")


async def growth(folder: Path, random: np.random.Generator) -> int:
    """Bytes that are held after 11,000 requests and were not after 1,000."""
    with closing(LmdbStore(folder)) as store:
        query = FeatureQuery(store, CacheConfig("sync"))
        assembler = Assembler(SCHEMA, Vocabularies(Vocabulary(np.arange(ITEMS)), {}))
        slot = Slot(slot_layout(SCHEMA, LAYOUT, BUCKET))

        async def serve(count: int) -> int:
            for number in range(count):
                candidates = random.integers(0, ITEMS, CANDIDATES)
                fetched = await query.fetch(f"u{number % 20}", candidates)
                record = assembler.assemble(RankRequest("u", candidates, 0, 10**6), fetched).record
                assembler.layout.fill(slot.fill(), [Piece(record, 0, CANDIDATES)], BUCKET, LAYOUT)
                slot.release()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        before = await serve(1000)
        return await serve(10_000) - before


def test_ten_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write(tmp_path, random)
    tracemalloc.start()
    try:
        assert asyncio.run(growth(tmp_path, random)) < GROWTH
    finally:
        tracemalloc.stop()
