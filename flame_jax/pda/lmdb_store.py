"""The embedded store: one LMDB folder, read in place."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np

from flame_jax.pda.records import (
    CorruptRecord,
    check_rows,
    decode_items,
    decode_user,
    encode_user,
    item_dtype,
    join_rows,
    user_dtype,
)
from flame_jax.pda.store import MAX_USER_KEY, Description, Fetched, StoreError
from flame_jax.request import History
from flame_jax.schema import FeatureSchema

log = logging.getLogger(__name__)

_TABLES = ("users", "items", "titles", "meta")
_META = b"meta"
_MAP_SIZE = 1 << 40  # address space, not disk: LMDB grows its file as needed


class LmdbStore:
    """Read-only view of a store folder.

    Reads take microseconds from the page cache, so they run on the caller's thread; a cold page blocks it
    for one disk read.

    Args:
        path: the folder.
        schema: what the records must have been written for, see `Description.check`; None takes what is there.

    Attributes:
        name: the folder.
        description: what it says it holds.

    Raises:
        StoreError: no store there, or one of another format or schema.
    """

    def __init__(self, path: str | Path, schema: FeatureSchema | None = None) -> None:
        self._env, self._tables = _open(Path(path), write=False)
        self._users, self._items, self._titles, self._meta = (self._tables[name] for name in _TABLES)
        self.name = str(path)
        try:
            with self._env.begin(self._meta) as txn:
                self.description = Description.parse(txn.get(_META), self.name)
            if schema is not None:
                self.description.check(schema, self.name)
        except StoreError:
            self._env.close()
            raise
        written = self.description.schema
        self._user_dtype, self._item_dtype = user_dtype(written), item_dtype(written)
        self._item_features = written.stored_item_features

    async def fetch(self, user: str | None, item_ids: np.ndarray, *, patient: bool = False) -> Fetched:
        """See `Store.fetch`."""
        return self._read(user, item_ids)

    def read(self, user: str | None, item_ids: np.ndarray) -> Fetched:
        """`fetch` for callers without an event loop, of int64[C] items in any order, which may repeat."""
        ids, inverse = np.unique(item_ids, return_inverse=True)
        fetched = self._read(user, ids)
        return Fetched(fetched.user, fetched.items[inverse], fetched.found[inverse])

    def _read(self, user: str | None, ids: np.ndarray) -> Fetched:
        keys = ids.astype("<i8").view("V8").tolist()
        try:
            with self._env.begin(buffers=True) as txn:
                blob = None if user is None else txn.get(user.encode(), db=self._users)
                record = None if blob is None or user is None else decode_user(user, blob, self._user_dtype)
                with txn.cursor(self._items) as cursor:
                    pairs = cursor.getmulti(keys)
                    stored = np.frombuffer(b"".join(map(itemgetter(0), pairs)), "<i8")
                    rows = join_rows(list(map(itemgetter(1), pairs)), self._item_dtype, self._item_features)
        except lmdb.Error as error:
            log.error("store %s: %s", self.name, error)
            raise StoreError(f"LMDB read failed: {error}") from error
        if (rows["id"] != stored).any():
            raise CorruptRecord("item record belongs to another item")
        return Fetched(record, *decode_items(ids, rows, self._item_features))

    def users(self) -> Iterator[str]:
        """Every user's key, sorted as bytes."""
        with self._env.begin(self._users) as txn:
            for key in txn.cursor().iternext(keys=True, values=False):
                yield bytes(key).decode()

    def item_ids(self) -> np.ndarray:
        """int64[n], every item in the store, ascending."""
        with self._env.begin(self._items) as txn:
            keys = b"".join(txn.cursor().iternext(keys=True, values=False))
        return np.sort(np.frombuffer(keys, "<i8").astype(np.int64))

    def count(self, table: str) -> int:
        """Values of a table: `users`, `items` or `titles`."""
        with self._env.begin() as txn:
            return int(txn.stat(self._tables[table])["entries"])

    def raw(self, table: str, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """A table's keys and values as they are stored, in the order of the keys, from the one after `after` on."""
        with self._env.begin(self._tables[table]) as txn, txn.cursor() as cursor:
            found = cursor.set_range(after) if after else cursor.first()
            if found and cursor.key() == after:
                found = cursor.next()
            if found:
                yield from cursor.iternext()

    def titles(self, item_ids: Iterable[int]) -> list[str | None]:
        """Display titles, None where the store has none."""
        with self._env.begin(self._titles) as txn:
            blobs = [txn.get(int(i).to_bytes(8, "little", signed=True)) for i in item_ids]
        return [None if b is None else bytes(b).decode() for b in blobs]

    def close(self) -> None:
        """Release the folder."""
        self._env.close()

    async def aclose(self) -> None:
        """See `Store.aclose`."""
        self.close()


class LmdbWriter:
    """Fills a store; the store is readable only once `finish` has run.

    Raises:
        StoreError: the folder can't be created, or holds a finished store.
    """

    def __init__(self, path: str | Path, schema: FeatureSchema) -> None:
        self._path, self._schema = Path(path), schema
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store folder {path} can't be created: {error.strerror}") from error
        self._env, tables = _open(self._path, write=True)
        self._tables = tables
        with self._env.begin(tables["meta"]) as txn:
            if txn.get(_META) is not None:
                self._env.close()
                raise StoreError(f"store {path} exists already; remove the folder to import again")
        with self._env.begin(write=True) as txn:
            for table in tables.values():  # what an import that broke off left
                txn.drop(table, delete=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._env.close()

    def put_users(self, users: Iterable[tuple[str, History, np.ndarray]]) -> int:
        """Write users in one transaction and return how many. Raises ValueError for a bad key or history."""
        count = 0
        with self._env.begin(self._tables["users"], write=True) as txn:
            for key, history, features in users:
                if not 0 < len(key.encode()) <= MAX_USER_KEY:
                    raise ValueError(f"user key {key[:40]!r} must have 1..{MAX_USER_KEY} bytes")
                history.check(self._schema.actions)
                if features.dtype != user_dtype(self._schema) or features.shape:
                    raise ValueError(f"features of user {key[:40]!r} are not a row of {user_dtype(self._schema)}")
                check_rows(self._schema.user_features, features)
                txn.put(key.encode(), encode_user(key, history, features))
                count += 1
        return count

    def put_items(self, rows: np.ndarray, titles: dict[int, str] | None = None) -> None:
        """Write structured[n] rows of `records.item_dtype`, and display titles by id."""
        if rows.dtype != item_dtype(self._schema):
            raise ValueError(f"item rows are {rows.dtype}, expected {item_dtype(self._schema)}")
        check_rows(self._schema.stored_item_features, rows)
        with self._env.begin(write=True) as txn:
            for row in rows:
                txn.put(row["id"].tobytes(), row.tobytes(), db=self._tables["items"])
            for item, title in (titles or {}).items():
                txn.put(item.to_bytes(8, "little", signed=True), title.encode(), db=self._tables["titles"])

    def finish(self, dataset: str) -> None:
        """Mark the store complete."""
        with self._env.begin(self._tables["meta"], write=True) as txn:
            txn.put(_META, Description(dataset, self._schema, uuid.uuid4().hex).to_bytes())
        self._env.sync(True)


def _open(path: Path, *, write: bool) -> tuple[lmdb.Environment, dict[str, Any]]:
    if not write and not os.path.isfile(path / "data.mdb"):
        raise StoreError(f"no store at {path}: run flame_jax.data import first")
    try:
        env = lmdb.open(
            str(path), map_size=_MAP_SIZE, max_dbs=len(_TABLES), readonly=not write, create=write, max_readers=512
        )
        if os.path.getsize(path / "data.mdb") < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
            env.close()
            raise StoreError(f"store {path} can't be opened: data.mdb is truncated")
        return env, {name: env.open_db(name.encode(), create=write) for name in _TABLES}
    except lmdb.Error as error:
        raise StoreError(f"store {path} can't be opened: {error}") from error
