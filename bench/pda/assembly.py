"""Microseconds from a request and its features to a record, and from the record into a slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.records import UserRecord, item_dtype, user_dtype
from flame_jax.pda.staging import Slot
from flame_jax.pda.store import Fetched
from flame_jax.record import Piece
from flame_jax.request import History, RankRequest
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary

REQUESTS, ROUNDS = 200, 5
NOW = 2_000_000_000


class Case(NamedTuple):
    """Requests of this size, with a vocabulary of so many ids; `reach` is in microseconds for the record."""

    events: int
    candidates: int
    ids: str
    reach: float


CASES = [
    Case(512, 512, "dense", 60),
    Case(512, 512, "5 million", 150),
    Case(4096, 2048, "dense", 200),
    Case(4096, 2048, "5 million", 500),
]


def schema_of(case: Case) -> FeatureSchema:
    """Two blocks, of all events and of half of them, and features of every group."""
    return FeatureSchema(
        actions=4,
        blocks=(Block("all"), Block("liked", (1, 2))),
        block_length=case.events,
        item_features=(Feature("genre", "categorical", 5), Feature("year", "numeric")),
        user_features=(Feature("age", "categorical", 9),),
        context_features=(Feature("hour", "categorical", 24),),
    )


def keys_of(ids: str, random: np.random.Generator) -> np.ndarray:
    """int64[n] of a vocabulary: in a row, or anywhere among 2^40."""
    return np.arange(1, 1_000_001) if ids == "dense" else random.choice(2**40, 5_000_000, replace=False)


def requests(
    case: Case, schema: FeatureSchema, keys: np.ndarray, random: np.random.Generator, count: int
) -> list[tuple[RankRequest, Fetched]]:
    """Random ones, each with its features."""
    found = []
    for _ in range(count):
        times = np.sort(random.integers(10**9, NOW, case.events))
        actions = random.integers(0, schema.actions, case.events).astype(np.int32)
        user = UserRecord(History(random.choice(keys, case.events), actions, times), np.zeros((), user_dtype(schema)))
        candidates = random.choice(keys, case.candidates)
        items = np.zeros(case.candidates, item_dtype(schema))
        items["id"] = candidates
        request = RankRequest("u", candidates, 0, NOW, context={"hour": 3})
        found.append((request, Fetched(user, items, np.ones(case.candidates, bool))))
    return found


def assembly(progress: Callable[[str], None], cases: Sequence[Case] = CASES, count: int = REQUESTS) -> dict[str, Any]:
    """A row per case: median and 90th percentile of both steps."""
    rows = []
    for case in cases:
        random, schema, layout = np.random.default_rng(0), schema_of(case), Layout(align=64, max_requests=1)
        keys = keys_of(case.ids, random)
        assembler = Assembler(schema, Vocabularies(Vocabulary(keys), {}))
        bucket = Bucket(case.events + case.candidates, case.candidates)
        slot, taken, copied = Slot(slot_layout(schema, layout, bucket)), list[float](), list[float]()
        for request, fetched in requests(case, schema, keys, random, count) * ROUNDS:
            begun = time.perf_counter()
            record = assembler.assemble(request, fetched).record
            made = time.perf_counter()
            assembler.layout.fill(slot.fill(), [Piece(record, 0, case.candidates)], bucket, layout)
            slot.release()
            taken.append((made - begun) * 1e6)
            copied.append((time.perf_counter() - made) * 1e6)
        figures = {
            f"{what}_{name}_us": float(np.percentile(times, share))
            for what, times in (("record", taken), ("slot", copied))
            for name, share in (("p50", 50), ("p90", 90))
        }
        rows.append(case._asdict() | figures)
        progress(f"{case.events} + {case.candidates}, {case.ids} ids: {figures['record_p50_us']:.0f} us")
    return {"assembly": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows: Sequence[dict[str, Any]] = result["assembly"]
    lines = ["| events + candidates | ids | record us (P90) | reach | into the slot us (P90) |", "|" + "---|" * 5]
    lines += [
        f"| {r['events']} + {r['candidates']} | {r['ids']} | {r['record_p50_us']:.0f} ({r['record_p90_us']:.0f}) "
        f"| {r['reach']:.0f} | {r['slot_p50_us']:.0f} ({r['slot_p90_us']:.0f}) |"
        for r in rows
    ]
    return "\n".join(lines)
