"""Arrow tables of events, items and users into a new store.

Everything lies in memory: at the peak about 150 bytes for each event, of which its user, item and time as integers and
the store's own pages are the half; strings come on top, and 16 bytes for each side feature that the log itself holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from flame_jax.data import values
from flame_jax.data.columns import Column
from flame_jax.data.errors import DataError
from flame_jax.data.plan import Plan, make_plan, require
from flame_jax.feature_config import DataConfig
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.records import item_dtype, user_dtype
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema, default_rows


class Counts(NamedTuple):
    """What a store holds after an import."""

    users: int
    items: int
    events: int


class Log(NamedTuple):
    """Every event, in the order of the table.

    Attributes:
        users: int32[n], index of the event's user in `names`.
        names: distinct user keys.
        items: int64[n] item ids.
        actions: int32[n].
        times: of each event.
    """

    users: np.ndarray
    names: list[str]
    items: np.ndarray
    actions: np.ndarray
    times: values.Times


class Users(NamedTuple):
    """What is stored of the users, in the order of their keys.

    Attributes:
        names: their keys.
        ends: int64[n], where each one's events end in `order`; they begin where the last one's end.
        order: int64[events], rows of the log by user and time.
        features: structured[n] of `user_dtype`.
    """

    names: list[str]
    ends: np.ndarray
    order: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class _Source:
    """Everything that one import reads."""

    schema: FeatureSchema
    settings: DataConfig
    plan: Plan
    events: pa.Table
    items: pa.Table | None
    users: pa.Table | None

    def check_columns(self) -> None:
        """Raise DataError unless the tables have the columns that the plan names, and there are events."""
        for what in ("events", "items", "users"):
            table, wanted = getattr(self, what), getattr(self.plan, what)
            if table is not None:
                require(what, wanted.columns, table.column_names)
        if not self.events.num_rows:
            raise DataError("the log has no events")


def import_tables(
    store: str | Path,
    schema: FeatureSchema,
    settings: DataConfig,
    events: pa.Table,
    items: pa.Table | None = None,
    users: pa.Table | None = None,
) -> Counts:
    """Check the tables, then write them into a new store. Nothing is written unless everything is right.

    Args:
        store: folder of the new store.
        schema: what the store is written for.
        settings: what the tables' columns mean; its paths are not read.
        events: one row per event.
        items: one row per item; without it an item's features are those of its newest event.
        users: likewise for users.

    Raises:
        DataError: the tables don't hold what the settings and the schema say.
        StoreError: the store exists or can't be written.
    """
    plan = make_plan(schema, settings, items=items is not None, users=users is not None)
    source = _Source(schema, settings, plan, events, items, users)
    source.check_columns()
    columns = [Column(events, "events", settings.item_column, "item id")]
    if items is not None:
        columns.append(Column(items, "items", settings.item_column, "item id"))
    ids, texts = values.item_ids(columns)
    log = _log(source, ids[0])
    people = _users(source, log)
    rows, titles = _items(source, log, None if items is None else ids[1])
    with LmdbWriter(store, schema) as writer:
        writer.put_items(rows, {**(texts or {}), **titles})
        bar = tqdm(_histories(log, people), desc="write users", unit="user", total=len(people.names), disable=None)
        written = writer.put_users(bar)
        writer.finish(settings.name)
    return Counts(written, len(rows), len(log.items))


def _log(source: _Source, items: np.ndarray) -> Log:
    settings, events = source.settings, source.events
    codes, names = values.users(Column(events, "events", settings.user_column, "user"))
    times = values.times(Column(events, "events", settings.time_column, "time"), settings.time_unit)
    if settings.action_column:
        column = Column(events, "events", settings.action_column, "action")
        actions = values.actions(column, settings.actions, source.schema.actions)
    else:
        actions = np.zeros(len(items), np.int32)
    return Log(codes, names, items, actions, times)


def _users(source: _Source, log: Log) -> Users:
    order = _by_user_and_time(source.settings, log)
    ends = np.cumsum(np.bincount(log.users, minlength=len(log.names)))
    names, schema = list(log.names), source.schema
    if source.users is None:
        features = default_rows(schema.user_features, user_dtype(schema), len(names))
        _fill(features, slice(None), source.events, "events", source.plan.user_columns, order[ends - 1])
        return Users(names, ends, order, features)
    column = Column(source.users, "users", source.settings.user_column, "user")
    codes, listed = values.users(column)
    _refuse_twice(column, codes)
    known = set(names)
    names += [name for name in listed if name not in known]
    if missing := len(names) - len(listed):
        said = f"{missing} of {len(log.names)} users of the log have no features: the table of users lacks them"
        if missing == len(log.names):
            raise DataError(f"{said}; do both tables hold the same keys?")
        print(said)
    index = {name: at for at, name in enumerate(names)}
    # Distinct values come in order of appearance: as none is twice, `listed` is in the order of the rows.
    at = np.fromiter((index[name] for name in listed), np.int64, len(listed))
    features = default_rows(schema.user_features, user_dtype(schema), len(names))
    _fill(features, at, source.users, "users", source.plan.user_columns)
    ends = np.concatenate([ends, np.full(len(names) - len(ends), len(order))])
    return Users(names, ends, order, features)


def _by_user_and_time(settings: DataConfig, log: Log) -> np.ndarray:
    """int64[n], rows of the log by user and time, equal times as they stand. Raises DataError if time falls."""
    clock = log.times.clock
    if settings.unsorted == "sort":
        return np.lexsort((clock, log.users))
    order = np.argsort(log.users, kind="stable")
    users, clock = log.users[order], clock[order]
    falls = (users[1:] == users[:-1]) & (clock[1:] < clock[:-1])
    if falls.any():
        row = int(order[1:][falls].min())
        raise DataError(
            f"row {row} of the events: user {log.names[log.users[row]]!r} goes back in time in column "
            f"{settings.time_column!r}; sort the log by time, or set data.unsorted to sort"
        )
    return order


def _items(source: _Source, log: Log, listed: np.ndarray | None) -> tuple[np.ndarray, dict[int, str]]:
    """Structured[n] of `item_dtype` and titles by id: of the table of items, or of every item of the log.

    Args:
        listed: int64[n] ids of the table of items, if there is one.
    """
    table, what, rows = source.items, "items", None
    if table is None or listed is None:
        table, what = source.events, "events"
        ids, codes = np.unique(log.items, return_inverse=True)
        if source.plan.item_columns or source.settings.title_column:
            rows = np.lexsort((log.times.clock, codes))[np.cumsum(np.bincount(codes)) - 1]  # the newest of each
    else:
        ids = listed
        _refuse_twice(Column(table, what, source.settings.item_column, "item id"), ids)
        logged = np.unique(log.items)
        if missing := len(np.setdiff1d(logged, ids)):
            said = f"{missing} of {len(logged)} items of the log have no features: the table of items lacks them"
            if missing == len(logged):
                raise DataError(f"{said}; do both tables hold the same ids?")
            print(said)
    out = default_rows(source.schema.stored_item_features, item_dtype(source.schema), len(ids))
    out["id"] = ids
    _fill(out, slice(None), table, what, source.plan.item_columns, rows)
    if not source.settings.title_column:
        return out, {}
    return out, _titles(Column(table, what, source.settings.title_column, "title"), ids, rows)


def _titles(column: Column, ids: np.ndarray, rows: np.ndarray | None) -> dict[int, str]:
    if not (column.is_text or column.is_integer) and column.values.null_count < len(column):
        raise column.mistyped("strings")
    taken = column.values if rows is None else column.values.take(pa.array(rows))
    pairs = zip(ids.tolist(), taken.to_pylist(), strict=True)
    return {item: str(title) for item, title in pairs if title is not None}


def _fill(
    out: np.ndarray,
    at: np.ndarray | slice,
    table: pa.Table,
    what: str,
    columns: tuple[tuple[Feature, str], ...],
    rows: np.ndarray | None = None,
) -> None:
    """Set the features of structured[n] `out` at `at` to some rows of a table, or to all; every row is checked."""
    for feature, name in columns:
        found = values.feature_values(Column(table, what, name, f"feature {feature.name!r}"), feature)
        out[feature.name][at] = found if rows is None else found[rows]


def _refuse_twice(column: Column, keys: np.ndarray) -> None:
    """Raise DataError unless the keys [n] of a column are distinct."""
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if len(again):
        row = int(again.min())
        raise column.at(row, f"is {column.values[row].as_py()!r}, as it is in an earlier row")


def _histories(log: Log, people: Users) -> Iterator[tuple[str, History, np.ndarray]]:
    """Every user as `LmdbWriter.put_users` takes them, by key, which is the order that LMDB writes fastest."""
    items, actions, seconds = (c[people.order] for c in (log.items, log.actions, log.times.seconds))
    starts = np.concatenate([[0], people.ends[:-1]])
    for at in sorted(range(len(people.names)), key=people.names.__getitem__):
        span = slice(starts[at], people.ends[at])
        yield people.names[at], History(items[span], actions[span], seconds[span]), people.features[at, ...]
