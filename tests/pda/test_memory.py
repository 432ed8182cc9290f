"""Memory of the feature path: it does not grow with the requests that have been."""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import flame_jax
from flame_jax.feature_config import CacheConfig
from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.records import UserRecord, feature_row, item_dtype, user_dtype
from flame_jax.pda.staging import Slot
from flame_jax.pda.store import Fetched
from flame_jax.record import Piece
from flame_jax.request import History, RankRequest
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary
from flame_jax.workspace import BufferPool

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
BUFFER = 4096
OBJECTS = 1024
"""Bytes of Python objects that a line makes besides."""


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


class LineByLine:
    """Bytes that were allocated at one moment while a line of the engine ran, at most: by it, or by other threads."""

    def __init__(self) -> None:
        self.most: dict[tuple[str, int], int] = {}
        self._line: tuple[str, int] | None = None
        self._before = 0
        self._root = str(Path(flame_jax.__file__).parent)

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._root):
            return None
        if self._line is not None:
            allocated = tracemalloc.get_traced_memory()[1] - self._before
            self.most[self._line] = max(allocated, self.most.get(self._line, 0))
        self._line = Path(frame.f_code.co_filename).name, frame.f_lineno
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        return self


@pytest.mark.parametrize(
    "keys", [np.arange(1, 200_001), 7 * np.arange(1, 60_001), 7 * np.arange(1, 200_001)], ids=["row", "search", "index"]
)
def test_a_request_of_512_events_and_512_candidates_makes_no_buffer_of_its_own_over_4_kb(keys: np.ndarray) -> None:
    random, size, pool = np.random.default_rng(0), 512, BufferPool()
    schema = FeatureSchema(
        actions=4, blocks=(Block("all"), Block("some", (1, 2))), block_length=size,
        item_features=(Feature("year", "numeric"),), user_features=(Feature("age", "categorical", 9),),
    )  # fmt: skip
    layout, bucket = Layout(align=64, max_requests=1), Bucket(2 * size, size)
    assembler = Assembler(schema, Vocabularies(Vocabulary(keys), {}), pool=pool)
    slot = Slot(slot_layout(schema, layout, bucket))
    actions, times = random.integers(0, 4, size).astype(np.int32), np.sort(random.integers(0, 10**6, size))

    def request() -> tuple[RankRequest, Fetched]:
        user = UserRecord(History(random.choice(keys, size), actions, times), np.zeros((), user_dtype(schema)))
        items = np.zeros(size, item_dtype(schema))
        items["id"] = candidates = random.choice(keys, size)
        return RankRequest("u", candidates, 0, 10**6), Fetched(user, items, np.ones(size, bool))

    def serve(request: RankRequest, fetched: Fetched) -> None:
        record = assembler.assemble(request, fetched).record
        assembler.layout.fill(slot.fill(), [Piece(record, 0, size)], bucket, layout)
        slot.release()
        pool.give(record)

    serve(*request())
    told, asked, rounds = sys.gettrace(), [request() for _ in range(5)], [LineByLine() for _ in range(5)]
    gc.disable()  # callbacks and finalizers would count for the line that sets them off
    tracemalloc.start()
    try:
        for each, lines in zip(asked, rounds, strict=True):
            sys.settrace(lines)
            serve(*each)
            sys.settrace(told)
    finally:
        sys.settrace(told)
        tracemalloc.stop()
        gc.enable()
    # What other threads allocate does not come at the same line of every request.
    reached = set().union(*(lines.most for lines in rounds))
    least = {line: min(lines.most[line] for lines in rounds if line in lines.most) for line in reached}
    assert any(file == "record.py" for file, _ in least)
    assert {line: bytes for line, bytes in least.items() if bytes > BUFFER + OBJECTS} == {}
