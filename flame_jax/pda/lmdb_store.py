"""The embedded store: one LMDB folder, read in place."""

from __future__ import annotations

import json
import os
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
    user_dtype,
)
from flame_jax.pda.store import MAX_USER_KEY, Fetched, StoreError
from flame_jax.request import History
from flame_jax.schema import FeatureSchema

FORMAT = 1
_TABLES = ("users", "items", "titles", "meta")
_META = b"meta"
_MAP_SIZE = 1 << 40  # address space, not disk: LMDB grows its file as needed


class LmdbStore:
    """Read-only view of a store folder.

    Reads take microseconds from the page cache, so they run on the caller's thread; a cold page blocks it
    for one disk read.

    Args:
        path: the folder.
        schema: what the records must have been written for, see `check`; None takes what is there.

    Attributes:
        dataset: what it says it holds.

    Raises:
        StoreError: no store there, or one of another format or schema.
    """

    def __init__(self, path: str | Path, schema: FeatureSchema | None = None) -> None:
        self._env, tables = _open(Path(path), write=False)
        self._users, self._items, self._titles, self._meta = (tables[name] for name in _TABLES)
        meta = self._read_meta(path)
        try:
            written = FeatureSchema.from_json(meta["schema"])
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise StoreError(f"store {path} has a damaged description") from error
        self.dataset = str(meta.get("dataset"))
        self._user_dtype, self._item_dtype = user_dtype(written), item_dtype(written)
        self._item_features = written.stored_item_features
        self._path, self._fingerprint = path, written.store_fingerprint()
        if schema is not None:
            try:
                self.check(schema)
            except StoreError:
                self.close()
                raise

    def check(self, schema: FeatureSchema) -> None:
        """Raise StoreError when the records were written for a schema that stores something else."""
        if schema.store_fingerprint() != self._fingerprint:
            raise StoreError(
                f"store {self._path} was written for another feature schema (actions, item or user features differ)"
            )

    def _read_meta(self, path: str | Path) -> dict[str, Any]:
        with self._env.begin(self._meta) as txn:
            blob = txn.get(_META)
        if blob is None:
            self.close()
            raise StoreError(f"store {path} is incomplete: its import has not finished")
        try:
            meta = json.loads(blob)
        except ValueError:
            meta = None
        if not isinstance(meta, dict):
            self.close()
            raise StoreError(f"store {path} has a damaged description")
        if meta.get("format") != FORMAT:
            self.close()
            raise StoreError(f"store {path} has format {meta.get('format')}, this program reads {FORMAT}")
        return meta

    async def fetch(self, user: str | None, item_ids: np.ndarray) -> Fetched:
        """See `Store.fetch`."""
        return self.read(user, item_ids)

    def read(self, user: str | None, item_ids: np.ndarray) -> Fetched:
        """`fetch` for callers without an event loop."""
        ids, inverse = np.unique(item_ids, return_inverse=True)
        keys = ids.astype("<i8").view("V8").tolist()
        try:
            with self._env.begin(buffers=True) as txn:
                blob = None if user is None else txn.get(user.encode(), db=self._users)
                record = None if blob is None or user is None else decode_user(user, blob, self._user_dtype)
                with txn.cursor(self._items) as cursor:
                    pairs = cursor.getmulti(keys)
                    stored = np.frombuffer(b"".join(map(itemgetter(0), pairs)), "<i8")
                    lengths = set(map(len, map(itemgetter(1), pairs)))
                    packed = b"".join(map(itemgetter(1), pairs))
        except lmdb.Error as error:
            raise StoreError(f"LMDB read failed: {error}") from error
        if lengths - {self._item_dtype.itemsize}:
            raise CorruptRecord("item record has the wrong length")
        rows = np.frombuffer(packed, self._item_dtype)
        if (rows["id"] != stored).any():
            raise CorruptRecord("item record belongs to another item")
        try:
            check_rows(self._item_features, rows)
        except ValueError as error:
            raise CorruptRecord(f"item record: {error}") from error
        rows, found = decode_items(ids, rows, self._item_features)
        return Fetched(record, rows[inverse], found[inverse])

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

    def titles(self, item_ids: Iterable[int]) -> list[str | None]:
        """Display titles, None where the store has none."""
        with self._env.begin(self._titles) as txn:
            blobs = [txn.get(int(i).to_bytes(8, "little", signed=True)) for i in item_ids]
        return [None if b is None else bytes(b).decode() for b in blobs]

    def close(self) -> None:
        """See `Store.close`."""
        self._env.close()


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
        meta = {
            "format": FORMAT,
            "dataset": dataset,
            "schema": self._schema.to_json(),
        }
        with self._env.begin(self._tables["meta"], write=True) as txn:
            txn.put(_META, json.dumps(meta).encode())
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
