"""Logs of one's own, from files to what a store reads back."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_jax.data.__main__ import main
from flame_jax.data.tables import Counts, import_tables
from flame_jax.feature_config import DataConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.schema import NO_KEY, Feature, FeatureSchema
from tests.data.logs import Columns, User, grouped, read, run, write

FORMATS = ["parquet", "csv", "csv.gz"]

PLAIN = FeatureSchema(actions=3)
SIDE = FeatureSchema(
    actions=3,
    item_features=(
        Feature("brand", "id", 10),
        Feature("price", "numeric", source="table"),
        Feature("tags", "bits", 4),
        Feature("position", "categorical", 9, source="request"),
    ),
    user_features=(Feature("age", "categorical", 7), Feature("member", "categorical", 2)),
)

LOG: dict[str, list[Any]] = {
    "user": ["b", "a", "b", "c", "a", "b"],
    "item": [30, 10, 10, 2**62, 10, 20],
    "timestamp": [100, 50, 100, 7, 60, 2**31 - 1],
}
ACTS = ["view", "cart", "buy", "view", "view", "cart"]
STORED = {"a": User([10, 10], [1, 0], [50, 60]), "b": User([30, 10, 20], [0, 2, 1], [100, 100, 2**31 - 1]),
          "c": User([2**62], [0], [7])}  # fmt: skip


def stable(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**63


@pytest.mark.parametrize("ending", FORMATS)
def test_a_log_is_read_back_by_user(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / f"log.{ending}", {"unused": list("uvwxyz"), **LOG, "act": ACTS})
    store = run(tmp_path, PLAIN, events=log, action_column="act", actions=["view", "cart", "buy"])
    found = read(store, PLAIN)
    assert found.users == STORED
    assert found.items == {10: (), 20: (), 30: (), 2**62: ()}
    assert found.titles == {}
    streams = capsys.readouterr()
    assert streams.out == f"imported 3 users, 4 items and 6 events into {store}\n"
    assert streams.err == ""


def test_without_a_column_of_actions_every_event_has_the_first(tmp_path: Path) -> None:
    found = read(run(tmp_path, PLAIN, events=write(tmp_path / "log.csv", LOG)), PLAIN)
    assert [user.actions for user in found.users.values()] == [[0, 0], [0, 0, 0], [0]]


def test_flags_beat_the_file_and_columns_have_the_names_that_are_said(tmp_path: Path) -> None:
    renamed = dict(zip(("who", "what", "when"), LOG.values(), strict=True))
    write(tmp_path / "log.csv", renamed)
    names = {"user_column": "who", "item_column": "what", "time_column": "then"}
    flags = ["--data.time_column=when", f"--data.events={tmp_path / 'log.csv'}"]
    store = run(tmp_path, PLAIN, *flags, events="none.csv", **names)
    assert list(read(store, PLAIN).users) == ["a", "b", "c"]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_is_one_log(tmp_path: Path, ending: str) -> None:
    log = {**LOG, "act": ACTS}
    for part, (start, stop) in enumerate([(0, 1), (1, 4), (4, 6)]):
        write(tmp_path / "log" / f"part-{part}.{ending}", {k: v[start:stop] for k, v in log.items()})
    settings = {"action_column": "act", "actions": ["view", "cart", "buy"]}
    assert read(run(tmp_path, PLAIN, events=tmp_path / "log", **settings), PLAIN).users == STORED


# Actions


@pytest.mark.parametrize(
    ("names", "values"),
    [
        ([1, 2, 3], pa.array([3, 1, 2])),
        ([1, 2, 3], pa.array([3.0, 1.0, 2.0])),
        ([1.0, 2.0, 3.0], pa.array([3, 1, 2], pa.uint8())),
        ([0.1, 0.5, 0.7], pa.array([0.7, 0.1, 0.5], pa.float32())),
        ([2**60 + 1, 2**60 + 2, 2**60 + 3], pa.array([2**60 + 3, 2**60 + 1, 2**60 + 2])),
        (["view", "1", "buy"], pa.array(["buy", "view", "1"], pa.large_string())),
        (["01", "2", "3"], pa.array(["3", "01", "2"])),
        (["view", 1, "buy"], pa.array(["buy", "view", "1"]).dictionary_encode()),
        ([], pa.array([2, 0, 1], pa.int8())),
    ],
    ids=[
        "integers",
        "floats",
        "floats of integers",
        "narrow floats",
        "large",
        "text",
        "digits",
        "text and a number",
        "unnamed",
    ],
)
def test_actions_are_named_in_the_schemas_order(tmp_path: Path, names: list[Any], values: pa.Array) -> None:
    log = {"user": ["u"] * 3, "item": [1, 2, 3], "timestamp": [1, 2, 3], "act": values}
    for ending in ("parquet", "csv"):
        (folder := tmp_path / ending).mkdir()
        # 0.7 as a 32-bit float would be written as 0.699999988079071.
        texts = [names[at] for at in (2, 0, 1)] if values.type == pa.float32() else values.to_pylist()
        columns = log if ending == "parquet" else {**log, "act": texts}
        store = run(folder, PLAIN, events=write(folder / f"log.{ending}", columns), action_column="act", actions=names)
        assert read(store, PLAIN).users["u"].actions == [2, 0, 1]


# Times


ZONE = datetime.timezone(datetime.timedelta(hours=5, minutes=30))


@pytest.mark.parametrize(
    ("times", "unit", "seconds"),
    [
        (pa.array([0, 1_700_000_000]), "s", [0, 1_700_000_000]),
        (pa.array([999, 1_700_000_000_999]), "ms", [0, 1_700_000_000]),
        (pa.array([1_000_000, 1_700_000_000_000_001], pa.uint64()), "us", [1, 1_700_000_000]),
        (pa.array([0, 1_700_000_000_999_999_999]), "ns", [0, 1_700_000_000]),
        (pa.array([0.5, 1_700_000_000.999]), "s", [0, 1_700_000_000]),
        (pa.array([7, 2**31 - 1], pa.int32()), "s", [7, 2**31 - 1]),
        (pa.array([0, 1_700_000_000_999], pa.timestamp("ms")), "s", [0, 1_700_000_000]),
        (pa.array([0, 1_700_000_000_999_999], pa.timestamp("us", "Asia/Kolkata")), "ns", [0, 1_700_000_000]),
        (pa.array([0, 1_700_000_000], pa.timestamp("s")), "ms", [0, 1_700_000_000]),
        (pa.array([0, 19675], pa.date32()), "s", [0, 19675 * 86400]),
        (pa.array([0, 19675 * 86_400_000], pa.date64()), "s", [0, 19675 * 86400]),
    ],
    ids=str,
)
def test_times_are_floored_to_seconds(tmp_path: Path, times: pa.Array, unit: str, seconds: list[int]) -> None:
    log = write(tmp_path / "log.parquet", {"user": ["u", "u"], "item": [1, 1], "timestamp": times})
    assert read(run(tmp_path, PLAIN, events=log, time_unit=unit), PLAIN).users["u"].times == seconds


@pytest.mark.parametrize(
    ("texts", "moments"),
    [
        (["2001-02-03", "2001-02-04"], [datetime.datetime(2001, 2, 3), datetime.datetime(2001, 2, 4)]),
        (
            ["2001-02-03 04:05:06", "2001-02-03T04:05:07.9"],
            [datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2001, 2, 3, 4, 5, 7)],
        ),
        (["2001-02-03T04:05:06+05:30"] * 2, [datetime.datetime(2001, 2, 3, 4, 5, 6, tzinfo=ZONE)] * 2),
        (["2001-02-03 04:05:06Z"] * 2, [datetime.datetime(2001, 2, 3, 4, 5, 6)] * 2),
    ],
    ids=["dates", "without a zone", "with a zone", "UTC"],
)
def test_moments_of_csv_are_utc_unless_they_say_otherwise(
    tmp_path: Path, texts: list[str], moments: list[datetime.datetime]
) -> None:
    log = write(tmp_path / "log.csv", {"user": ["u", "u"], "item": [1, 1], "timestamp": texts})
    seconds = [int((m if m.tzinfo else m.replace(tzinfo=datetime.UTC)).timestamp()) for m in moments]
    assert read(run(tmp_path, PLAIN, events=log), PLAIN).users["u"].times == seconds


def test_unsorted_events_are_sorted_if_asked_to_and_equal_times_stay(tmp_path: Path) -> None:
    log = {"user": [*"aabaab"], "item": [1, 2, 3, 4, 5, 6], "timestamp": [2000, 1000, 7000, 1999, 1000, 1000]}
    path = write(tmp_path / "log.parquet", log)
    found = read(run(tmp_path, PLAIN, events=path, unsorted="sort", time_unit="ms"), PLAIN)
    assert found.users["a"].items == [2, 5, 4, 1], "4 comes later within the second of 2 and 5"
    assert found.users["b"].items == [6, 3]


# Side features


BRANDS = pa.array([5, 6, None, 7, 8, 9])
FEATURED: Columns = {**LOG, "brand": BRANDS, "cost": [1.5, 2, 2.5, 3, 3.5, 4], "tags": [1, 2, 3, 4, 5, 15],
                     "item_age": [0] * 6, "age": [1, 2, 3, 4, 5, 6], "member": [True, False] * 3}  # fmt: skip
COLUMNS = {"price": "cost"}


@pytest.mark.parametrize("ending", FORMATS)
def test_features_of_the_log_itself_are_those_of_the_newest_event(tmp_path: Path, ending: str) -> None:
    columns = FEATURED if ending == "parquet" else {**FEATURED, "brand": BRANDS.to_pylist()}
    found = read(run(tmp_path, SIDE, events=write(tmp_path / f"log.{ending}", columns), columns=COLUMNS), SIDE)
    # Item 10: of the times 50, 100 and 60 the second is the newest.
    assert found.items == {10: (NO_KEY, 2.5, 3), 20: (9, 4.0, 15), 30: (5, 1.5, 1), 2**62: (7, 3.0, 4)}
    assert {key: user.features for key, user in found.users.items()} == {"a": (5, 1), "b": (6, 0), "c": (4, 0)}


def test_of_events_at_one_time_the_last_row_is_the_newest(tmp_path: Path) -> None:
    schema = FeatureSchema(item_features=(Feature("size", "categorical", 9),), user_features=(Feature("x", "numeric"),))
    log = {"user": ["a", "b", "a"], "item": [1, 1, 1], "timestamp": [5, 5, 5], "size": [1, 2, 3], "x": [1, 2, 3]}
    found = read(run(tmp_path, schema, events=write(tmp_path / "log.parquet", log)), schema)
    assert found.items == {1: (3,)}
    assert [user.features for user in found.users.values()] == [(3.0,), (2.0,)]


ITEMS: Columns = {"item": [20, 77, 10], "brand": [None, 2**63 - 1, 0], "price": [1, 2, 3], "tags": [0, 15, 8],
                  "name": ["1984", None, "Über"]}  # fmt: skip
USERS: Columns = {"user": ["new", "b", "c"], "age": [6, 0, 3], "member": [1, 0, 1]}


@pytest.mark.parametrize("ending", FORMATS)
def test_features_and_titles_of_tables(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    events, items, users = (
        write(tmp_path / f"{name}.{ending}", columns)
        for name, columns in (("log", LOG), ("items", ITEMS), ("users", USERS))
    )
    found = read(run(tmp_path, SIDE, events=events, items=items, users=users, title_column="name"), SIDE)
    assert found.items == {10: (0, 3.0, 8), 20: (NO_KEY, 1.0, 0), 77: (2**63 - 1, 2.0, 15)}
    assert found.titles == {10: "Über", 20: "1984"}
    assert {key: (user.times, user.features) for key, user in found.users.items()} == {
        "a": ([50, 60], (0, 0)),
        "b": ([100, 100, 2**31 - 1], (0, 0)),
        "c": ([7], (3, 1)),
        "new": ([], (6, 1)),
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "1 of 3 users of the log have no features: the table of users lacks them",
        "2 of 4 items of the log have no features: the table of items lacks them",
        f"imported 4 users, 3 items and 6 events into {tmp_path / 'store'}",
    ]


def test_users_without_a_row_have_missing_ids(tmp_path: Path) -> None:
    schema = FeatureSchema(user_features=(Feature("city", "id", 5),))
    users = write(tmp_path / "users.csv", {"user": ["a"], "city": [4]})
    found = read(run(tmp_path, schema, events=write(tmp_path / "log.csv", LOG), users=users), schema)
    assert [user.features for user in found.users.values()] == [(4,), (NO_KEY,), (NO_KEY,)]


def test_items_and_users_may_have_features_of_one_name(tmp_path: Path) -> None:
    schema = FeatureSchema(
        item_features=(Feature("age", "categorical", 9), Feature("region", "categorical", 9)),
        user_features=(Feature("age", "categorical", 9), Feature("region", "categorical", 9)),
    )
    log = write(tmp_path / "log.csv", {**LOG, "a": [1] * 6, "b": [2] * 6, "r": [3] * 6})
    columns = {"item.age": "a", "user.age": "b", "region": "r"}
    found = read(run(tmp_path, schema, events=log, columns=columns), schema)
    assert set(found.items.values()) == {(1, 3)}
    assert {user.features for user in found.users.values()} == {(2, 3)}


# Ids and users that are text


NAMES = ["x1", "007", "x1", "☃", "7", "x1"]


@pytest.mark.parametrize("ending", FORMATS)
def test_ids_of_text_are_hashed_and_kept_as_titles(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / f"log.{ending}", {**LOG, "item": NAMES})
    found = read(run(tmp_path, PLAIN, events=log), PLAIN)
    assert found.users["b"].items == [stable("x1")] * 3
    assert found.users["a"].items == [stable("007"), stable("7")]
    assert found.titles == {stable(name): name for name in NAMES}
    assert set(found.items) == set(found.titles)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "item id in column 'item' is text: 4 distinct ones were hashed to int64 (stable_key)"
    assert len(lines) == 2


def test_titles_of_a_column_come_before_those_of_hashed_ids(tmp_path: Path) -> None:
    names = ["x1", "☃", "only"]
    items = write(tmp_path / "items.parquet", {"item": names, "name": ["The First", None, "The Third"]})
    log = write(tmp_path / "log.csv", {**LOG, "item": NAMES})
    store = run(tmp_path, PLAIN, events=log, items=items, title_column="name")
    found = read(store, PLAIN)
    assert found.titles == {stable("x1"): "The First", stable("☃"): "☃", stable("only"): "The Third"}
    assert set(found.items) == {stable(name) for name in names}
    with closing(LmdbStore(store)) as reader:
        assert reader.titles([stable("007")]) == ["007"], "of the log, without a row of its own"


def test_integers_beside_ids_of_text_count_as_their_digits(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG)  # read as integers
    items = write(tmp_path / "items.csv", {"item": ["10", "20", "30", "x1"], "brand": [1, 2, 3, 4]})
    schema = FeatureSchema(item_features=(Feature("brand", "id", 9),))
    found = read(run(tmp_path, schema, events=log, items=items), schema)
    assert found.items == {stable("10"): (1,), stable("20"): (2,), stable("30"): (3,), stable("x1"): (4,)}
    assert found.users["b"].items == [stable("30"), stable("10"), stable("20")]


@pytest.mark.parametrize("ending", FORMATS)
def test_features_of_text_are_hashed(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    schema = FeatureSchema(item_features=(Feature("brand", "id", 9),))
    items = {"item": [10, 20, 30, 40], "brand": ["acme", None, "12", "acme"]}
    events, table = write(tmp_path / f"log.{ending}", LOG), write(tmp_path / f"items.{ending}", items)
    found = read(run(tmp_path, schema, events=events, items=table), schema)
    acme = (stable("acme"),)
    assert found.items == {10: acme, 20: (NO_KEY,), 30: (stable("12"),), 40: acme}
    assert found.titles == {}
    assert "feature 'brand' in column 'brand' is text: 2 distinct ones" in capsys.readouterr().out


@pytest.mark.parametrize("brand", [pa.nulls(6), pa.nulls(6, pa.string()), pa.nulls(6, pa.float64())], ids=str)
def test_a_feature_may_be_missing_everywhere(tmp_path: Path, brand: pa.Array) -> None:
    schema = FeatureSchema(item_features=(Feature("brand", "id", 9),))
    found = read(run(tmp_path, schema, events=write(tmp_path / "log.parquet", {**LOG, "brand": brand})), schema)
    assert set(found.items.values()) == {(NO_KEY,)}


@pytest.mark.parametrize("ending", FORMATS)
def test_user_keys_of_csv_are_what_is_written_and_integers_are_their_digits(tmp_path: Path, ending: str) -> None:
    users = [12, 7, 12, -1, 7, 12]
    found = read(run(tmp_path, PLAIN, events=write(tmp_path / f"log.{ending}", {**LOG, "user": users})), PLAIN)
    assert {key: user.times for key, user in found.users.items()} == {
        "12": [100, 100, 2**31 - 1],
        "7": [50, 60],
        "-1": [7],
    }


def test_user_keys_are_told_apart_to_the_byte(tmp_path: Path) -> None:
    for users in (["7", "07", "null", "é" * 128, " 7", "NA"], ["7", "07", "007", "70", "7.0", "-7"]):
        (folder := tmp_path / users[2]).mkdir()
        log = write(folder / "log.csv", {**LOG, "user": users})
        listed = write(folder / "users.csv", {"user": [*users[:3], "0"], "n": range(4)})
        assert set(read(run(folder, PLAIN, events=log, users=listed), PLAIN).users) == {*users, "0"}


def test_titles_that_look_like_numbers_are_text(tmp_path: Path) -> None:
    items = write(tmp_path / "items.csv", {"item": [10, 20, 30], "name": ["007", "1984", "1e3"]})
    found = read(run(tmp_path, PLAIN, events=write(tmp_path / "log.csv", LOG), items=items, title_column="name"), PLAIN)
    assert found.titles == {10: "007", 20: "1984", 30: "1e3"}


def test_titles_of_the_log_itself_are_those_of_the_newest_event(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", {**LOG, "name": ["x", "old", "new", None, "between", "y"]})
    assert read(run(tmp_path, PLAIN, events=log, title_column="name"), PLAIN).titles == {10: "new", 20: "y", 30: "x"}


# Any log


@st.composite
def logs(draw: st.DrawFn) -> dict[str, list[Any]]:
    """A log whose times fall nowhere, or anywhere."""
    count = draw(st.integers(1, 25))

    def column(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
        return st.lists(values, min_size=count, max_size=count)

    text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=4)
    keys = draw(st.lists(text | st.sampled_from(["1", "01", "nan"]), min_size=1, max_size=4))
    times = draw(column(st.integers(0, 2**31 - 1) | st.integers(0, 3)))
    return {
        "user": draw(column(st.sampled_from(keys))),
        "item": draw(column(st.integers(0, 2**63 - 1) | st.integers(0, 3))),
        "timestamp": sorted(times) if draw(st.booleans()) else times,
        "act": draw(column(st.integers(0, 2))),
        "size": draw(column(st.integers(0, 8))),
    }


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(logs())
def test_every_log_is_grouped_as_plain_python_groups_it(log: dict[str, list[Any]]) -> None:
    schema = FeatureSchema(actions=3, item_features=(Feature("size", "categorical", 9),))
    users = grouped(log["user"], log["item"], log["timestamp"], log["act"])
    newest = {}
    for _, item, size in sorted(zip(log["timestamp"], log["item"], log["size"], strict=True), key=lambda row: row[0]):
        newest[item] = (size,)
    falls = any(
        [t for t, u in zip(log["timestamp"], log["user"], strict=True) if u == user] != users[user].times
        for user in users
    )
    for ending in ("parquet", "csv"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = write(folder / f"log.{ending}", log)
            if falls:
                with pytest.raises(SystemExit):
                    run(folder, schema, events=path, action_column="act")
            store = run(folder, schema, events=path, action_column="act", unsorted="sort" if falls else "refuse")
            assert read(store, schema) == (users, newest, {})


# The command and the function


def test_tables_in_memory_are_imported_as_files_are(tmp_path: Path) -> None:
    settings = DataConfig(action_column="act", actions=("view", "cart", "buy"), title_column="name")
    events = pa.table({**LOG, "act": ACTS})
    counts = import_tables(tmp_path / "store", SIDE, settings, events, pa.table(dict(ITEMS)), pa.table(dict(USERS)))
    assert counts == Counts(users=4, items=3, events=6)
    assert {key: user[:3] for key, user in read(tmp_path / "store", SIDE).users.items() if key != "new"} == {
        key: user[:3] for key, user in STORED.items()
    }


def test_an_import_that_broke_off_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    log = write(tmp_path / "log.csv", LOG)
    with monkeypatch.context() as patch:
        patch.setattr("flame_jax.pda.lmdb_store.LmdbWriter.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, PLAIN, events=log)
    assert len(read(run(tmp_path, PLAIN, events=log), PLAIN).users) == 3


def test_help_says_what_every_setting_means(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    for argv in (["import", "--help"], ["import", "--data.name=x", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert "unit of times that are numbers" in shown
        assert "a user's key, in the log and in users: strings or integers" in shown
        assert "when empty, every event has action 0" in shown
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    assert "--config FILE" in capsys.readouterr().out


def test_without_pyarrow_one_line_names_the_extra(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from flame_jax.data.keys import stable_key\n"
        "from flame_jax.data.__main__ import main\n"
        "main(['import', '--data.events=log.csv', f'--store.path={sys.argv[1]}'])"
    )
    ended = subprocess.run([sys.executable, "-c", probe, str(tmp_path / "s")], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "python -m flame_jax.data: error: the importer needs pyarrow: pip install 'flame-jax[data]'\n"
    )
