"""What answering without waiting for the store costs: AUC on the demo's test events, asked for in the order of time.

Every user asks once, for all of his test events; the clock goes on by a fixed step from call to call. What the
background fetches is there for the next call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from flame_jax.config import Config
from flame_jax.dso.executor import Executor
from flame_jax.feature_config import CacheConfig
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.engine import Engine
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.cache import ItemCache
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.page_lock import PageLock
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.store import Fetched, StoreError
from flame_jax.record import Piece
from flame_jax.request import History
from flame_jax.training.evaluation import Quality, evaluate
from flame_jax.training.examples import Dataset, Example, held_out_examples, split_points

CALLS_PER_SECOND = 100
TTL_SECONDS = 60.0


class Case(NamedTuple):
    """A cache for this share of the items; the store is gone from this share of the calls on."""

    name: str
    room: float
    gone: float = 1.0


CASES = [
    Case("every item has room", 1.0),
    Case("a tenth has", 0.1),
    Case("every item has room, the store is gone for the second half", 1.0, 0.5),
    Case("a tenth has, the store is gone for the second half", 0.1, 0.5),
]


class Leaving:
    """A store that fails when told."""

    def __init__(self, store: LmdbStore) -> None:
        self.name, self.description = store.name, store.description
        self._store, self.gone = store, False

    async def fetch(self, user: str | None, item_ids: np.ndarray, *, patient: bool = False) -> Fetched:
        """See `Store.fetch`."""
        if self.gone:
            raise StoreError("gone")
        return await self._store.fetch(user, item_ids)

    async def aclose(self) -> None:
        """See `Store.aclose`."""


class _World:
    """The demo's model, its users and what they are asked for."""

    def __init__(self, config: Config, store: LmdbStore) -> None:
        self.engine = Engine(Artifact(config.export.artifact), jax.devices()[0])
        manifest = self.engine.manifest
        self.schema, self.layout = manifest.schema, manifest.layout
        self.dataset = Dataset(store, self.schema, config.train.label_actions)
        self.items = len(store.item_ids())
        lengths = self.dataset.lengths()
        starts = split_points(lengths, config.train.test_fraction)
        bucket = manifest.buckets[-1]
        found = held_out_examples(starts, lengths, self.dataset.moments(), most=bucket.candidates // 2)
        self.examples = sorted(found, key=self._time)
        self.assembler = Assembler(self.schema, self.engine.vocabularies)
        self._executor = Executor(self.engine, bucket, self.assembler.layout, self.layout, PageLock(self.engine.device))

    def _time(self, example: Example) -> int:
        return int(self.dataset.users[example.user][1].history.timestamps[example.seen])

    def scores(self, example: Example, fetched: Fetched | None) -> tuple[np.ndarray, np.ndarray]:
        """Labels and probabilities of the first task; from the store's own features where none are given."""
        candidates = self.dataset.candidates(example.user, example.start, example.stop, None)
        request, stored = self.dataset.request(example, candidates.items)
        if fetched is not None and fetched.user_lost:
            request = replace(request, history=History.empty())
        used = stored if fetched is None else stored._replace(user=fetched.user, items=fetched.items)
        record = self.assembler.assemble(request, used).record
        self._executor.fill([Piece(record, 0, len(candidates.items))])
        self._executor.launch()
        return candidates.labels[:, 0] > 0, self._executor.scores()[0].values[:, 0]


def staleness(config: Config, progress: Callable[[str], None], cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """A row per case, after one that waits for the store."""
    with closing(LmdbStore(config.store.path)) as store:
        world = _World(config, store)
        waited = [world.scores(example, None) for example in world.examples]
        rows = [{"case": "waited for"} | _figures(world, waited)]
        progress(f"waited for: AUC {rows[0]['auc']:.4f}")
        for case in cases:
            rows.append(asyncio.run(_at_once(case, world, store)))
            progress(f"{case.name}: AUC {rows[-1]['auc']:.4f}")
    return {"calls_per_second": CALLS_PER_SECOND, "ttl_seconds": TTL_SECONDS, "staleness": rows}


async def _at_once(case: Case, world: _World, store: LmdbStore) -> dict[str, Any]:
    leaving, now = Leaving(store), 0
    config = CacheConfig("async", ttl_seconds=TTL_SECONDS)
    query = FeatureQuery(leaving, config)
    room = max(1, round(case.room * world.items))
    query.cache = ItemCache(world.schema, config, clock=lambda: now, entries=room)
    scored, degraded, pairs = [], 0, 0
    for number, example in enumerate(world.examples):
        now = number * 10**9 // CALLS_PER_SECOND
        leaving.gone = number >= case.gone * len(world.examples)
        candidates = world.dataset.candidates(example.user, example.start, example.stop, None).items
        fetched = await query.fetch(world.dataset.users[example.user][0], candidates)
        scored.append(world.scores(example, fetched))
        degraded += fetched.degraded
        pairs += len(candidates)
        await asyncio.sleep(0)
    counts = query.cache.counts
    shares = {
        "degraded": degraded / len(world.examples),
        "stale": counts.stale / pairs,
        "defaults": counts.misses / pairs,
    }
    return case._asdict() | {"case": case.name} | shares | _figures(world, scored)


def _figures(world: _World, scored: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    users = np.repeat([example.user for example in world.examples], [len(labels) for labels, _ in scored])
    labels, scores = (np.concatenate(column) for column in zip(*scored, strict=True))
    quality: Quality = evaluate(users, labels, scores)
    return {"calls": len(scored), "auc": quality.auc, "user_auc": quality.user_auc, "log_loss": quality.log_loss}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows: Sequence[dict[str, Any]] = result["staleness"]
    lines = ["| | degraded | stale | defaults | AUC | per-user AUC | log loss |", "|" + "---|" * 7]
    lines += [
        f"| {r['case']} | {r.get('degraded', 0):.0%} | {r.get('stale', 0):.1%} | {r.get('defaults', 0):.1%} "
        f"| {r['auc']:.4f} | {r['user_auc']:.4f} | {r['log_loss']:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)
