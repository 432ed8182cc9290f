"""Logs as plain columns of Python values: written as files, imported, read back."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flame_jax.data.__main__ import main
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.schema import FeatureSchema

Columns = Mapping[str, Sequence[Any] | pa.Array]


class User(NamedTuple):
    """A stored user."""

    items: list[int]
    actions: list[int]
    times: list[int]
    features: tuple[Any, ...] = ()


class Contents(NamedTuple):
    """All that a store holds."""

    users: dict[str, User]
    items: dict[int, tuple[Any, ...]]
    titles: dict[int, str]


def write(path: Path, columns: Columns) -> Path:
    """Write columns as the file that the path's ending names, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(columns)), path, row_group_size=3)
        return path
    rows = [["" if value is None else str(value) for value in row] for row in zip(*columns.values(), strict=True)]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *rows])
    return path


def run(folder: Path, schema: FeatureSchema, *flags: str, **data: Any) -> Path:
    """Import what the section `data` says, as the command does, and return the new store's folder."""
    config = folder / "config.yaml"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in data.items()}
    config.write_text(json.dumps({"store": {"path": str(folder / "store")}, "schema": schema.to_json(), "data": plain}))
    main(["import", "--config", str(config), *flags])
    return folder / "store"


def read(path: Path, schema: FeatureSchema) -> Contents:
    """Everything in a store, as plain values."""
    none = np.empty(0, np.int64)
    with closing(LmdbStore(path, schema)) as store:
        users = {}
        for key in store.users():
            record = store.read(key, none).user
            assert record is not None
            history = record.history
            columns = (history.item_ids.tolist(), history.actions.tolist(), history.timestamps.tolist())
            users[key] = User(*columns, record.features.item() or ())
        ids = store.item_ids()
        rows = store.read(None, ids).items.tolist()
        named = zip(ids.tolist(), store.titles(ids), strict=True)
        return Contents(users, {row[0]: row[1:] for row in rows}, {i: t for i, t in named if t is not None})


def grouped(
    users: Sequence[str], items: Sequence[int], times: Sequence[int], actions: Sequence[int]
) -> dict[str, User]:
    """Each user's events by time, equal times as they stand."""
    out: dict[str, User] = {}
    for user in users:
        events = [e for e in zip(times, items, actions, users, strict=True) if e[3] == user]
        events.sort(key=lambda event: event[0])  # stable
        out[user] = User([e[1] for e in events], [e[2] for e in events], [e[0] for e in events])
    return out
