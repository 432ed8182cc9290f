"""A small store that tests of every kind of store read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flame_jax.packing import MAX_TIME
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.pda.store import MAX_USER_KEY
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema

SCHEMA = FeatureSchema(
    actions=3,
    item_features=(Feature("year", "numeric"), Feature("shop", "categorical", 9)),
    user_features=(Feature("age", "categorical", 9),),
)
IDS = (0, 3, 5, 7, 2**31, 2**32 + 3, 2**63 - 1)
YEARS = {key: 1.0 + position for position, key in enumerate(IDS)}
HISTORIES = {
    "u": History(np.array([3, 2**32 + 3], np.int64), np.array([0, 2], np.int32), np.array([10, 20], np.int64)),
    "ü/\0☃": History(np.array([2**63 - 1], np.int64), np.array([1], np.int32), np.array([MAX_TIME], np.int64)),
    "x" * MAX_USER_KEY: History.empty(),
}
AGES = dict(zip(HISTORIES, (1, 2, 3), strict=True))


def item_rows(years: dict[int, float]) -> np.ndarray:
    rows = np.zeros(len(years), item_dtype(SCHEMA))
    rows["id"], rows["year"] = list(years), list(years.values())
    return rows


def age(years: int) -> np.ndarray:
    return feature_row(SCHEMA.user_features, {"age": years})


def ids(*keys: int) -> np.ndarray:
    return np.array(keys, np.int64)


def key_of(item: int) -> bytes:
    return item.to_bytes(8, "little", signed=True)


def write_store(path: Path) -> None:
    with LmdbWriter(path, SCHEMA) as writer:
        writer.put_items(item_rows(YEARS), {3: "Three ☃", -1: "Below"})
        assert writer.put_users((key, history, age(AGES[key])) for key, history in HISTORIES.items()) == 3
        writer.finish("test")
