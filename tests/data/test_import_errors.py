"""Every log that can't be imported ends in status 1 and one line that says where and what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flame_jax.data import keys
from flame_jax.feature_config import DataConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.schema import Feature, FeatureSchema
from tests.data.logs import run, write

SCHEMA = FeatureSchema(
    actions=3,
    item_features=(Feature("brand", "id", 9), Feature("price", "numeric"), Feature("tags", "bits", 3)),
    user_features=(Feature("age", "categorical", 7),),
)
LOG: dict[str, Any] = {
    "user": ["a", "b", "a", "c"],
    "item": [1, 2, 3, 4],
    "timestamp": [10, 20, 30, 40],
    "act": ["view", "cart", "buy", "view"],
    "brand": [1, 2, 3, None],
    "price": [0.5, 1.5, 2.5, 3.5],
    "tags": [0, 1, 2, 7],
    "age": [0, 1, 2, 6],
}
ITEMS: dict[str, Any] = {"item": [1, 2, 9], "brand": [1, 2, 3], "price": [1, 2, 3], "tags": [1, 2, 3]}
USERS: dict[str, Any] = {"user": ["a", "b", "z"], "age": [1, 2, 3]}
ACTIONS: dict[str, Any] = {"action_column": "act", "actions": ["view", "cart", "buy"]}

Capture = pytest.CaptureFixture[str]


def refusal(folder: Path, capsys: Capture, schema: FeatureSchema = SCHEMA, *, status: int = 1, **data: Any) -> str:
    """Import what must be refused, and return the one line that says why."""
    with pytest.raises(SystemExit) as ended:
        run(folder, schema, **data)
    assert ended.value.code == status
    err = capsys.readouterr().err
    assert err.startswith("python -m flame_jax.data")
    assert err.endswith("\n")
    assert err.count("\n") == 1, "the reason takes one line"
    return err.partition(": error: ")[2]


def without(column: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in columns.items() if name != column}


WRONG_LOGS: dict[str, tuple[dict[str, Any], str]] = {
    "no events": ({name: pa.array([], pa.int64()) for name in LOG}, "the log has no events"),
    "user null": ({"user": ["a", None, "b", None]}, "row 1 of the events: user in column 'user' is missing"),
    "user empty": (
        {"user": ["a", "b", "", "c"]},
        "row 2 of the events: user in column 'user' is '': it must have 1..256",
    ),
    "user long": ({"user": ["a", "é" * 129, "a", "b"]}, "row 1 of the events: user in column 'user' is 'ééé"),
    "user float": ({"user": [1.0, 2.0, 3.0, 4.0]}, "column 'user' holds double, user must be strings or integers"),
    "item null": ({"item": [1, 2, None, 3]}, "row 2 of the events: item id in column 'item' is missing"),
    "item negative": (
        {"item": [1, -2, -3, 4]},
        "row 1 of the events: item id in column 'item' is -2: it must not be neg",
    ),
    "item large": (
        {"item": pa.array([1, 2, 3, 2**63], pa.uint64())},
        f"row 3 of the events: item id in column 'item' is {2**63}, which does not fit int64",
    ),
    "item empty": ({"item": ["a", "b", "", "c"]}, "row 2 of the events: item id in column 'item' is empty"),
    "item float": ({"item": [1.0, 2.0, 3.0, 4.0]}, "column 'item' holds double, item id must be integers or strings"),
    "item date": ({"item": pa.array([1, 2, 3, 4], pa.date32())}, "column 'item' holds date32[day], item id must be"),
    "time null": ({"timestamp": [None, 2, 3, 4]}, "row 0 of the events: time in column 'timestamp' is missing"),
    "time text": ({"timestamp": [*"abcd"]}, "column 'timestamp' holds string, time must be integers or 64-bit floats"),
    "time narrow": ({"timestamp": pa.array([1.0, 2, 3, 4], pa.float32())}, "column 'timestamp' holds float, time must"),
    "time negative": (
        {"timestamp": [-1, 2, 3, 4]},
        "row 0 of the events: time in column 'timestamp' is -1: outside [0, 2*",
    ),
    "time late": (
        {"timestamp": [1, 2, 3, 2**31]},
        "row 3 of the events: time in column 'timestamp' is 2147483648: outs",
    ),
    "time nan": (
        {"timestamp": [1.0, float("nan"), 3, 4]},
        "row 1 of the events: time in column 'timestamp' is nan: outs",
    ),
    "time infinite": (
        {"timestamp": [1.0, 2, float("inf"), 4]},
        "row 2 of the events: time in column 'timestamp' is inf",
    ),
    "time of old": (
        {"timestamp": pa.array([-1, 2, 3, 4], pa.timestamp("s"))},
        "row 0 of the events: time in column 'timestamp' is 1969-12-31 23:59:59: outside",
    ),
    "time falls": (
        {"timestamp": [10, 20, 9, 0]},
        "row 2 of the events: user 'a' goes back in time in column 'timestamp'; sort the log by time, or set "
        "data.unsorted to sort",
    ),
    "action null": ({"act": ["view", None, "buy", "view"]}, "row 1 of the events: action in column 'act' is missing"),
    "action unknown": (
        {"act": ["view", "cart", "buy", "steal"]},
        "row 3 of the events: action in column 'act' is 'steal', not one of data.actions ['view', 'cart', 'buy']",
    ),
    "action integer": ({"act": [0, 1, 2, 0]}, "column 'act' holds int64, action must be strings, as data.actions are"),
    "id negative": (
        {"brand": [1, None, -1, 2]},
        "row 2 of the events: feature 'brand' in column 'brand' is -1: it must",
    ),
    "id float": ({"brand": [1.0, 2, 3, 4]}, "column 'brand' holds double, feature 'brand' must be integers or strings"),
    "id boolean": ({"brand": [True] * 4}, "column 'brand' holds bool, feature 'brand' must be integers or strings"),
    "numeric null": (
        {"price": [1, None, 2, 3]},
        "row 1 of the events: feature 'price' in column 'price' is missing; fill it in beforehand, or make "
        "the feature an id",
    ),
    "numeric text": ({"price": [*"abcd"]}, "column 'price' holds string, feature 'price' must be integers or floats"),
    "numeric nan": (
        {"price": [1.0, 2, float("nan"), 3]},
        "row 2 of the events: feature 'price' in column 'price' is nan, not a finite 32-bit float",
    ),
    "numeric large": (
        {"price": [1.0, 1e39, 1, 1]},
        "row 1 of the events: feature 'price' in column 'price' is 1e+39, not",
    ),
    "bits high": ({"tags": [0, 8, 1, 1]}, "row 1 of the events: feature 'tags' in column 'tags' is 8, outside [0, 8)"),
    "category high": ({"age": [0, 1, 2, 7]}, "row 3 of the events: feature 'age' in column 'age' is 7, outside [0, 7)"),
    "category low": (
        {"age": [0, -1, 2, 7]},
        "row 1 of the events: feature 'age' in column 'age' is -1, outside [0, 7)",
    ),
    "category null": ({"age": [None] * 4}, "row 0 of the events: feature 'age' in column 'age' is missing; fill it in"),
    "category float": (
        {"age": [1.0, 1, 1, 1]},
        "column 'age' holds double, feature 'age' must be integers or booleans",
    ),
    "category of an old row": (
        {"age": [99, 1, 2, 6]},
        "row 0 of the events: feature 'age' in column 'age' is 99, outside [0, 7)",
    ),
}


@pytest.mark.parametrize("name", WRONG_LOGS)
def test_a_wrong_log_is_refused(tmp_path: Path, capsys: Capture, name: str) -> None:
    changed, words = WRONG_LOGS[name]
    reason = refusal(tmp_path, capsys, events=write(tmp_path / "log.parquet", LOG | changed), **ACTIONS)
    assert words in reason
    assert not (tmp_path / "store").exists(), "nothing is touched before all is checked"


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no log": ({"events": ""}, "data.events names no log"),
    "no file": ({"events": "/none/log.csv"}, "events: there is no /none/log.csv"),
    "no user": (
        {"user_column": "who"},
        "no column 'who'; there are user, item, timestamp, act, brand, price, tags, age",
    ),
    "no two": ({"item_column": "what", "columns": {"age": "years"}}, "no column 'what', 'years'; there are user, item"),
    "no action": ({"action_column": "what"}, "no column 'what'; there are user,"),
    "no title": ({"title_column": "name"}, "no column 'name'; there are user,"),
    "title type": ({"title_column": "price"}, "column 'price' holds double, title must be strings"),
    "actions too few": ({"actions": ["view", "buy"]}, "data.actions names 2 actions, schema.actions is 3"),
    "actions in numbers": (
        {"actions": [1, 2, 3]},
        "column 'act' holds string, action must be numbers, as data.actions",
    ),
    "actions unnamed": (
        {"actions": []},
        "column 'act' holds string, action must be integers in [0, 3), or be named in",
    ),
    "actions high": (
        {"actions": [], "action_column": "tags"},
        "row 3 of the events: action in column 'tags' is 7, outside",
    ),
    "actions not a number's": (
        {"actions": [0, 1, 2], "action_column": "tags"},
        "row 3 of the events: action in column 'tags' is 7, not one of data.actions [0, 1, 2]",
    ),
    "feature unknown": (
        {"columns": {"colour": "c", "item.age": "a"}},
        "data.columns names 'colour', 'item.age', which the store does not hold; its features are item.brand, "
        "item.price, item.tags, user.age",
    ),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, capsys: Capture, name: str) -> None:
    changed, words = WRONG_SETTINGS[name]
    log = write(tmp_path / "log.parquet", LOG)
    assert words in refusal(tmp_path, capsys, **({"events": log} | ACTIONS | changed))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"actions": ["a"]}, "data.actions are values of data.action_column, which is empty"),
        ({"actions": [1, 1.0, 2], "action_column": "act"}, "data.actions must be distinct"),
        ({"actions": ["1", 1, 2], "action_column": "act"}, "data.actions must be distinct"),
        ({"actions": "view", "action_column": "act"}, "data.actions"),
        ({"user_column": ""}, "data.user_column is empty"),
        ({"name": ""}, "data.name is empty"),
        ({"columns": {"age": ""}}, "data.columns names an empty column"),
        ({"time_unit": "h"}, "data.time_unit"),
        ({"unsorted": "ignore"}, "data.unsorted"),
    ],
)
def test_settings_that_contradict_themselves_are_no_configuration(
    tmp_path: Path, capsys: Capture, data: dict[str, Any], words: str
) -> None:
    assert words in refusal(tmp_path, capsys, status=2, **data)


WRONG_TABLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "item twice": (
        {"item": [5, 9, 5]},
        {},
        "row 2 of the items: item id in column 'item' is 5, as it is in an earlier row",
    ),
    "item text twice": ({"item": ["x", "x", "y"]}, {}, "row 1 of the items: item id in column 'item' is 'x', as it is"),
    "item null": ({"item": [5, None, 6]}, {}, "row 1 of the items: item id in column 'item' is missing"),
    "item negative": ({"item": [5, 6, -1]}, {}, "row 2 of the items: item id in column 'item' is -1: it must not be"),
    "item feature": (
        {"tags": [1, 2, 8]},
        {},
        "row 2 of the items: feature 'tags' in column 'tags' is 8, outside [0, 8)",
    ),
    "user twice": (
        {},
        {"user": ["z", "a", "z"]},
        "row 2 of the users: user in column 'user' is 'z', as it is in an earl",
    ),
    "user twice, a number": (
        {},
        {"user": [3, 3, 4]},
        "row 1 of the users: user in column 'user' is 3, as it is in an ea",
    ),
    "user null": ({}, {"user": ["z", "a", None]}, "row 2 of the users: user in column 'user' is missing"),
    "user long": ({}, {"user": ["z", "a", "x" * 257]}, "row 2 of the users: user in column 'user' is 'xxx"),
    "user feature": ({}, {"age": [1, None, 2]}, "row 1 of the users: feature 'age' in column 'age' is missing"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_refused(tmp_path: Path, capsys: Capture, name: str) -> None:
    items, users, words = WRONG_TABLES[name]
    events = write(tmp_path / "log.csv", without("brand", LOG))
    paths = write(tmp_path / "items.parquet", ITEMS | items), write(tmp_path / "users.parquet", USERS | users)
    assert words in refusal(tmp_path, capsys, events=events, items=paths[0], users=paths[1])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("table", "column"), [("items", "item"), ("items", "price"), ("users", "user"), ("users", "age")]
)
def test_a_column_that_a_table_lacks_is_not_sought_in_the_log(
    tmp_path: Path, capsys: Capture, table: str, column: str
) -> None:
    path = write(tmp_path / f"{table}.csv", without(column, {"items": ITEMS, "users": USERS}[table]))
    data: dict[str, Any] = {"events": write(tmp_path / "log.parquet", LOG), table: path} | ACTIONS
    reason = refusal(tmp_path, capsys, **data)
    assert f"{table}.csv: no column '{column}'; there are " in reason


def test_a_time_that_python_can_not_print_is_named_all_the_same(tmp_path: Path, capsys: Capture) -> None:
    times = pa.array([10, -(2**62) - 1, 30, 40], pa.timestamp("ns"))
    events = write(tmp_path / "log.parquet", LOG | {"timestamp": times})
    said = refusal(tmp_path, capsys, events=events, **ACTIONS)
    assert said.startswith("row 1 of the events: time in column 'timestamp' is ")
    assert "outside [0, 2**31) seconds since the epoch" in said


def test_a_user_that_no_request_can_name_is_refused(tmp_path: Path, capsys: Capture) -> None:
    events = write(tmp_path / "log.parquet", LOG | {"user": ["a", "b\tc", "a", "c"]})
    said = refusal(tmp_path, capsys, events=events, **ACTIONS)
    assert said.startswith("row 1 of the events: user in column 'user' is 'b\\tc': ")


@pytest.mark.parametrize(("which", "table"), [("items", {"item": [7, 8, 9]}), ("users", {"user": ["x", "y", "z"]})])
def test_a_table_that_shares_no_key_with_the_log_is_refused(
    which: str, table: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    """The commonest mistake: ids of two systems."""
    events = write(tmp_path / "log.parquet", LOG)
    other = write(tmp_path / "table.parquet", (ITEMS if which == "items" else USERS) | table)
    data: dict[str, Any] = {"events": events, which: other, **ACTIONS}
    said = refusal(tmp_path, capsys, **data)
    assert "do both tables hold the same" in said


@pytest.mark.parametrize(
    ("seconds", "unit", "better"),
    [
        (1.7e9, 10**3, "ms"),
        (1.7e9, 10**6, "us"),
        (1.7e9, 10**9, "ns"),
        (1.2e8, 10**3, "ms"),
    ],
)
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()], ids=str)
def test_times_of_another_unit_name_the_one_that_fits(
    tmp_path: Path, capsys: Capture, seconds: float, unit: int, better: str, kind: pa.DataType
) -> None:
    times = pa.array([int(seconds) * unit + i for i in range(4)]).cast(kind, safe=False)
    log = write(tmp_path / "log.parquet", LOG | {"timestamp": times})
    reason = refusal(tmp_path, capsys, events=log, **ACTIONS)
    assert reason.startswith("row 0 of the events: time in column 'timestamp' is ")
    assert reason.rstrip().endswith(f"outside [0, 2**31) seconds since the epoch; data.time_unit {better} would fit")


def test_times_that_fit_no_unit_name_none(tmp_path: Path, capsys: Capture) -> None:
    log = write(tmp_path / "log.parquet", LOG | {"timestamp": [2**62] * 4})
    assert refusal(tmp_path, capsys, events=log, **ACTIONS).rstrip().endswith("since the epoch")


def test_a_fall_within_a_second_is_one(tmp_path: Path, capsys: Capture) -> None:
    log = write(tmp_path / "log.csv", LOG | {"timestamp": [1500, 1, 1499, 1]})
    assert "row 2 of the events: user 'a' goes back" in refusal(tmp_path, capsys, events=log, time_unit="ms", **ACTIONS)


def test_a_row_is_counted_over_all_parts_and_without_headers(tmp_path: Path, capsys: Capture) -> None:
    log = {name: values for name, values in LOG.items() if name != "age"}
    write(tmp_path / "log" / "1.csv", log | {"age": [1, 1, 1, 1]})
    write(tmp_path / "log" / "2.csv", log | {"timestamp": [50] * 4, "age": [1, 8, 1, 9]})
    reason = refusal(tmp_path, capsys, events=tmp_path / "log", **ACTIONS)
    assert reason.startswith("row 5 of the events: feature 'age' in column 'age' is 8")


@pytest.mark.parametrize("changed", ["item", "brand"])
def test_two_strings_of_one_key_end_the_import(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(keys, "stable_key", len)
    log = write(tmp_path / "log.parquet", LOG | {changed: ["a", "bb", "ccc", "dd"]})
    assert "'bb' and 'dd' hash to one key" in refusal(tmp_path, capsys, events=log, **ACTIONS)


def test_strings_of_the_log_and_of_the_table_may_not_share_a_key_either(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "stable_key", len)
    log = write(tmp_path / "log.parquet", LOG | {"item": ["a", "bb", "ccc", "bb"]})
    items = write(tmp_path / "items.parquet", ITEMS | {"item": ["a", "ccc", "xx"]})
    reason = refusal(tmp_path, capsys, events=log, items=items, **ACTIONS)
    assert "item id 'bb' and 'xx' hash to one key" in reason


def test_a_store_that_exists_is_refused_before_the_log_is_read(tmp_path: Path, capsys: Capture) -> None:
    run(tmp_path, SCHEMA, events=write(tmp_path / "log.parquet", LOG), **ACTIONS)
    capsys.readouterr()
    assert "exists already; remove the folder" in refusal(tmp_path, capsys, events="/none/log.csv")
    LmdbStore(tmp_path / "store", SCHEMA).close()


@pytest.mark.parametrize("argv", [["ml-100k"], ["ml-1m", "--store", "x"], []], ids=str)
def test_the_known_data_set_needs_its_name_and_store(argv: list[str], capsys: Capture) -> None:
    from flame_jax.data.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["import", *argv])
    assert ended.value.code == 2
    assert "--config FILE" in capsys.readouterr().err, "the usage names the other form"


def test_the_default_section_imports_nothing() -> None:
    assert DataConfig().events == ""
