"""Items' features in the server's memory: which are there, which are too old."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import cachebox
import numpy as np

from flame_jax.feature_config import CacheConfig
from flame_jax.pda.records import item_dtype
from flame_jax.schema import FeatureSchema, default_rows

OVERHEAD = 176
"""Bytes that an entry takes beside its own, measured: key, value and the cache's list and table."""
_NEVER_CAME = -(2**63)
"""When an entry expires that is not there."""
JITTER = 0.1
"""Largest share of an entry's life that is cut off by chance, so that what came together does not go together."""


class Lookup(NamedTuple):
    """What the cache has of int64[n] items, as arrays that whoever asked may change.

    Attributes:
        rows: structured[n] (`records.item_dtype`); each feature's default where it has none.
        found: bool[n], whether the store had the item.
        known: bool[n], whether there is an entry, if only of the store's not having it.
        fresh: bool[n], whether that is not too old.
    """

    rows: np.ndarray
    found: np.ndarray
    known: np.ndarray
    fresh: np.ndarray


class Counts(NamedTuple):
    """Since the start: items looked up, by outcome, and entries that made room for others."""

    hits: int
    stale: int
    misses: int
    evictions: int


class ItemCache:
    """Least recently used items make room for others. One thread, or a lock around it.

    Args:
        clock: nanoseconds.
        entries: at most, in place of `config.mib`.

    Attributes:
        entry_bytes: memory that an entry takes, about.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        config: CacheConfig,
        clock: Callable[[], int] = time.monotonic_ns,
        entries: int | None = None,
    ) -> None:
        self._features, self._clock = schema.stored_item_features, clock
        self._dtype = np.dtype([("expires", "<i8"), ("found", "?"), ("row", item_dtype(schema))])
        self._lives = np.array([config.absent_ttl_seconds, config.ttl_seconds]) * 1e9
        self.entry_bytes = self._dtype.itemsize + OVERHEAD
        room = config.mib * 2**20 // self.entry_bytes if entries is None else entries
        self._entries: cachebox.LRUCache[int, bytes] = cachebox.LRUCache(room)
        nothing = np.empty(1, self._dtype)
        nothing["expires"], nothing["found"], nothing["row"] = _NEVER_CAME, False, self.defaults(np.zeros(1, np.int64))
        self._nothing = nothing.tobytes()
        self._random = np.random.default_rng()
        self._hits = self._stale = self._misses = self._evictions = 0

    @property
    def nbytes(self) -> int:
        """Memory in use, about."""
        return len(self._entries) * self.entry_bytes

    @property
    def counts(self) -> Counts:
        """See `Counts`."""
        return Counts(self._hits, self._stale, self._misses, self._evictions)

    def lookup(self, ids: np.ndarray) -> Lookup:
        """What is there of int64[n] items, which becomes most recently used."""
        nothing = self._nothing
        values = [nothing if value is None else value for value in map(self._entries.get, ids.tolist())]
        entries = np.frombuffer(bytearray().join(values), self._dtype)
        expires, rows = entries["expires"], entries["row"]
        rows["id"] = ids
        known, fresh = expires != _NEVER_CAME, expires > self._clock()
        hits, held = int(np.count_nonzero(fresh)), int(np.count_nonzero(known))
        self._hits += hits
        self._stale += held - hits
        self._misses += len(ids) - held
        return Lookup(rows, entries["found"], known, fresh)

    def defaults(self, ids: np.ndarray) -> np.ndarray:
        """Rows of int64[n] items of which nothing is known."""
        rows = default_rows(self._features, self._dtype["row"], len(ids))
        rows["id"] = ids
        return rows

    def put(self, ids: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        """Keep what the store said of int64[n] distinct items.

        Args:
            rows: structured[n] (`records.item_dtype`).
            found: bool[n], whether the store had the item.
        """
        entries = np.empty(len(ids), self._dtype)
        lives = self._lives[found.astype(np.intp)] * (1.0 - JITTER * self._random.random(len(ids)))
        entries["expires"] = self._clock() + lives.astype(np.int64)
        entries["found"], entries["row"] = found, rows
        blobs = entries.view(f"V{self._dtype.itemsize}").tolist()
        before = len(self._entries)
        new = list(map(self._entries.insert, ids.tolist(), blobs)).count(None)
        self._evictions += before + new - len(self._entries)
