"""The LMDB store: what is written is read back, and what is damaged or missing is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest

from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.pda.records import CorruptRecord, encode_user, feature_row, item_dtype
from flame_jax.pda.store import MAX_USER_KEY, StoreError
from flame_jax.request import History, RankRequest
from flame_jax.schema import Block, Feature, FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests.pda.stored import HISTORIES, IDS, SCHEMA, YEARS, age, ids, item_rows, key_of, write_store


def put_raw(path: Path, table: str, values: dict[bytes, bytes]) -> None:
    """Write bytes into a table behind the store's back."""
    with closing(lmdb.open(str(path), max_dbs=4)) as env:
        database = env.open_db(table.encode())
        with env.begin(database, write=True) as txn:
            for key, value in values.items():
                txn.put(key, value)


@contextmanager
def opened(path: Path, schema: FeatureSchema | None = SCHEMA) -> Iterator[LmdbStore]:
    with closing(LmdbStore(path, schema)) as store:
        yield store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished store."""
    write_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LmdbStore]:
    """A finished store, open for every test that only reads."""
    folder = tmp_path_factory.mktemp("shared") / "store"
    write_store(folder)
    with opened(folder) as found:
        yield found


def test_a_store_lists_its_users_items_and_titles(store: LmdbStore) -> None:
    assert sorted(store.users()) == sorted(HISTORIES)
    assert store.item_ids().tolist() == sorted(IDS)
    assert store.titles([-1, 3, 5, 2**63 - 1]) == ["Below", "Three ☃", None, None]


def test_a_store_without_users_and_items_reads_as_empty(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "store", SCHEMA) as writer:
        writer.finish("nothing")
    with opened(tmp_path / "store") as store:
        assert list(store.users()) == []
        assert store.item_ids().tolist() == []
        assert store.read("u", ids(3, 3)).found.tolist() == [False, False]


def test_the_last_record_of_a_key_counts(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "store", SCHEMA) as writer:
        writer.put_items(item_rows({3: 1.0}))
        writer.put_items(item_rows({3: 2.0}))
        writer.put_users([("u", HISTORIES["u"], age(1)), ("u", History.empty(), age(2))])
        writer.finish("twice")
    with opened(tmp_path / "store") as store:
        fetched = store.read("u", ids(3))
        assert fetched.items["year"].tolist() == [2.0]
        assert fetched.user is not None
        assert len(fetched.user.history) == 0


def test_reading_goes_on_after_the_folder_is_deleted(path: Path) -> None:
    with opened(path) as store:
        shutil.rmtree(path)
        fetched = store.read("u", ids(*IDS))
        assert fetched.user is not None
        assert fetched.items["year"].tolist() == list(YEARS.values())


def test_a_closed_store_is_a_store_error(path: Path) -> None:
    store = LmdbStore(path, SCHEMA)
    store.close()
    with pytest.raises(StoreError):
        store.read("u", ids(3))


# Opening


@pytest.mark.parametrize("name", ["none", "none/deeper", "file", "file/deeper", "n" * 300])
def test_where_there_is_no_store_one_line_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("no store")
    with pytest.raises(StoreError) as error:
        LmdbStore(tmp_path / name, SCHEMA)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"", b"hello", bytes(3 * 4096), b"\xff" * 3 * 4096], ids=len)
def test_a_file_that_is_no_database_is_a_store_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    for _ in range(2):  # the failure must not leave the folder open in this process
        with pytest.raises(StoreError, match="can't be opened"):
            LmdbStore(tmp_path, SCHEMA)


def test_a_database_that_is_no_store_is_a_store_error(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path)).close()
    for _ in range(2):
        with pytest.raises(StoreError, match="can't be opened"):
            LmdbStore(tmp_path, SCHEMA)


def test_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path, SCHEMA) as writer:
        writer.put_items(item_rows(YEARS))
    for _ in range(2):
        with pytest.raises(StoreError, match="has not finished"):
            LmdbStore(tmp_path, SCHEMA)


@pytest.mark.parametrize(
    "other",
    [
        FeatureSchema(),
        FeatureSchema(actions=4, item_features=SCHEMA.item_features, user_features=SCHEMA.user_features),
        FeatureSchema(actions=3, item_features=SCHEMA.item_features[::-1], user_features=SCHEMA.user_features),
        FeatureSchema(actions=3, item_features=SCHEMA.item_features),
    ],
    ids=["default", "actions", "order", "users"],
)
def test_a_store_of_another_schema_is_refused_and_left_as_it_was(path: Path, other: FeatureSchema) -> None:
    with pytest.raises(StoreError, match="another feature schema"):
        LmdbStore(path, other)
    with opened(path) as store:
        assert store.item_ids().tolist() == sorted(IDS)


def test_an_open_store_is_checked_for_another_models_schema_and_stays_open(path: Path) -> None:
    with opened(path) as store:
        store.description.check(SCHEMA, store.name)
        other = FeatureSchema(actions=4, item_features=SCHEMA.item_features, user_features=SCHEMA.user_features)
        with pytest.raises(StoreError, match="another feature schema"):
            store.description.check(other, store.name)
        assert list(store.users())


def test_a_model_may_read_the_store_in_its_own_blocks_tasks_and_context(path: Path) -> None:
    model = FeatureSchema(
        tasks=("a", "b"),
        actions=3,
        blocks=(Block("late", (2,)),),
        block_length=4,
        item_features=SCHEMA.item_features,
        user_features=SCHEMA.user_features,
        context_features=(Feature("hour", "categorical", 24),),
    )
    with opened(path, model) as store:
        assert store.read("u", ids(3)).found.tolist() == [True]


def test_a_store_may_be_read_for_whatever_schema_it_was_written(path: Path) -> None:
    with opened(path, None) as store:
        assert store.read("u", ids(3)).items["year"].tolist() == [YEARS[3]]


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "schema": 5}',
        b'{"format": 1, "schema": {}}',
        b'{"format": 1, "schema": {"colour": 1}}',
        json.dumps({"format": 1, "schema": SCHEMA.to_json() | {"item_features": [{"name": "x"}]}}).encode(),
        json.dumps({"format": 1, "schema": SCHEMA.to_json() | {"actions": "3"}}).encode(),
    ],
    ids=[
        "empty",
        "garbage",
        "no text",
        "list",
        "null",
        "no format",
        "another format",
        "no schema",
        "schema a number",
        "schema without fields",
        "schema of unknown fields",
        "feature without kind",
        "actions a string",
    ],
)
def test_a_damaged_description_of_the_store_is_a_store_error(path: Path, meta: bytes) -> None:
    put_raw(path, "meta", {b"meta": meta})
    with pytest.raises(StoreError) as error:
        LmdbStore(path, SCHEMA)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.9])
def test_a_truncated_file_does_not_kill_the_process(tmp_path: Path, keep: float) -> None:
    many = tmp_path / "store"
    with LmdbWriter(many, SCHEMA) as writer:
        writer.put_items(item_rows(dict.fromkeys(range(2000), 1.0)))
        writer.finish("many")
    pages = (many / "data.mdb").stat().st_size // 4096
    os.truncate(many / "data.mdb", max(2, int(keep * pages)) * 4096)
    program = (
        "import sys, numpy\n"
        "from flame_jax.pda.lmdb_store import LmdbStore\n"
        "from flame_jax.pda.records import CorruptRecord\n"
        "from flame_jax.pda.store import StoreError\n"
        "try:\n"
        "    LmdbStore(sys.argv[1]).read(None, numpy.arange(2000))\n"
        "except (StoreError, CorruptRecord):\n"
        "    print('refused')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(many)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "refused\n"), ended.stderr


# Writing


def test_a_finished_store_is_not_written_again(path: Path) -> None:
    for _ in range(2):
        with pytest.raises(StoreError, match="exists already"):
            LmdbWriter(path, SCHEMA)
    with opened(path) as store:
        assert store.item_ids().tolist() == sorted(IDS)


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for name in ("file", "file/deeper", "n" * 300):
        with pytest.raises(StoreError, match="can't be created"):
            LmdbWriter(tmp_path / name, SCHEMA)


def test_an_import_after_one_that_broke_off_holds_only_its_own_records(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path, FeatureSchema(actions=1)) as writer:
        writer.put_items(np.array([(3,), (4,)], item_dtype(FeatureSchema())))
        writer.put_users([("old", History.empty(), feature_row((), {}))])
    with LmdbWriter(tmp_path, SCHEMA) as writer:
        writer.put_items(item_rows({3: 1.0}))
        writer.finish("second")
    with opened(tmp_path) as store:
        assert store.item_ids().tolist() == [3]
        assert list(store.users()) == []
        assert store.read("old", ids(3, 4)).found.tolist() == [True, False]


@pytest.mark.parametrize("key", ["", "x" * (MAX_USER_KEY + 1), "☃" * (MAX_USER_KEY // 3 + 1)])
def test_a_user_key_that_is_empty_or_too_long_is_refused(tmp_path: Path, key: str) -> None:
    with LmdbWriter(tmp_path, SCHEMA) as writer, pytest.raises(ValueError, match="user key"):
        writer.put_users([(key, History.empty(), age(1))])


def test_a_bad_history_is_refused_and_nothing_of_its_batch_is_kept(tmp_path: Path) -> None:
    bad = History(ids(1), np.array([SCHEMA.actions], np.int32), ids(1))
    with LmdbWriter(tmp_path, SCHEMA) as writer:
        with pytest.raises(ValueError, match="action"):
            writer.put_users([("good", HISTORIES["u"], age(1)), ("bad", bad, age(1))])
        writer.finish("test")
    with opened(tmp_path) as store:
        assert list(store.users()) == []


def test_rows_of_another_schema_are_refused(tmp_path: Path) -> None:
    other = FeatureSchema(user_features=(Feature("height", "numeric"),))
    with LmdbWriter(tmp_path, SCHEMA) as writer:
        with pytest.raises(ValueError, match="item rows"):
            writer.put_items(np.zeros(1, item_dtype(other)))
        with pytest.raises(ValueError):
            writer.put_users([("u", History.empty(), feature_row(other.user_features, {"height": 1.5}))])


@pytest.mark.parametrize("shop", [-1, 9, 2**31 - 1])
def test_a_category_outside_its_feature_is_not_served(tmp_path: Path, shop: int) -> None:
    # On the device it would be clamped to another category: a wrong score without an error.
    rows = item_rows({3: 1.0})
    rows["shop"] = shop
    with pytest.raises((ValueError, CorruptRecord)):
        write_and_read_items(tmp_path, rows)


def write_and_read_items(path: Path, rows: np.ndarray) -> None:
    with LmdbWriter(path, SCHEMA) as writer:
        writer.put_items(rows)
        writer.finish("test")
    with opened(path) as store:
        store.read(None, rows["id"])


# Damaged records


@pytest.mark.parametrize(
    "value",
    [b"", b"garbage", encode_user("u", HISTORIES["u"], age(1))[:-1], encode_user("v", HISTORIES["u"], age(1))],
    ids=["empty", "garbage", "short", "of another user"],
)
def test_a_damaged_user_is_corrupt(path: Path, value: bytes) -> None:
    put_raw(path, "users", {b"u": value})
    with opened(path) as store:
        with pytest.raises(CorruptRecord):
            store.read("u", ids(3))
        assert store.read(None, ids(3)).found.tolist() == [True], "others are read as before"


# The last, highest byte of each column of u's record, which ends: 2 ids, 2 times, 2 actions, age.
LAST_BYTES = {"ids": -29, "times": -13, "actions": -5, "features": -1}


@pytest.mark.parametrize("column", LAST_BYTES)
def test_a_sign_flipped_in_a_stored_user_is_corrupt(path: Path, column: str) -> None:
    damaged = bytearray(encode_user("u", HISTORIES["u"], age(1)))
    damaged[LAST_BYTES[column]] ^= 0x80
    put_raw(path, "users", {b"u": bytes(damaged)})
    with pytest.raises(CorruptRecord):
        read_and_assemble(path)


def read_and_assemble(path: Path) -> None:
    with opened(path) as store:
        request = RankRequest("u", ids(3), scenario=0, request_time=100)
        Assembler(SCHEMA, Vocabularies(Vocabulary(ids(*IDS)), {})).assemble(request, store.read("u", ids(3)))


ROW3, ROW5, ROW7 = (item_rows({key: 9.0}).tobytes() for key in (3, 5, 7))


@pytest.mark.parametrize(
    ("damage", "asked"),
    [
        ({5: ROW5[:-4]}, [5]),
        ({5: ROW5 + b"more"}, [5]),
        ({5: ROW7}, [5]),
        ({5: b""}, [5]),
        ({5: ROW5 + ROW5}, [5]),
        ({5: ROW5 + ROW7}, [3, 5, 6]),
        ({5: ROW7}, [5, 7]),
        ({7: ROW5}, [5, 7]),
        ({6: ROW7}, [6, 7]),
        ({4: ROW5}, [4, 5]),
        ({3: ROW3[:-4], 5: b"more" + ROW5}, [3, 5]),
    ],
    ids=[
        "short",
        "long",
        "of an item not asked for",
        "empty",
        "twice",
        "two items in one",
        "of an item asked for too, after",
        "of an item asked for too, before",
        "new, of the next item",
        "new, of the next item but one",
        "one short by what another is too long",
    ],
)
def test_a_damaged_item_is_corrupt_whatever_is_asked_with_it(
    path: Path, damage: dict[int, bytes], asked: list[int]
) -> None:
    put_raw(path, "items", {key_of(item): value for item, value in damage.items()})
    with opened(path) as store:
        with pytest.raises(CorruptRecord):
            store.read(None, ids(*asked))
        assert store.read(None, ids(2**63 - 1)).found.tolist() == [True], "others are read as before"


def test_an_item_stored_under_an_absent_items_key_is_corrupt(path: Path) -> None:
    # The item that the value names is asked for and is not in the store itself.
    put_raw(path, "items", {key_of(1): item_rows({2: 9.0}).tobytes()})
    with opened(path) as store, pytest.raises(CorruptRecord):
        store.read(None, ids(1, 2))
