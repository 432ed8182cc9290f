"""Stored blobs: they bring back what went in, and whatever else they hold is a corrupt record."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import MAX_TIME
from flame_jax.pda.records import (
    CorruptRecord,
    UserRecord,
    check_rows,
    decode_items,
    decode_user,
    encode_user,
    feature_row,
    item_dtype,
    user_dtype,
)
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema
from tests.test_schema import feature_groups

Value = int | float

FEATURES = (
    Feature("age", "categorical", 7),
    Feature("tags", "bits", 31),
    Feature("height", "numeric"),
    Feature("maker", "id", 3),
)
SCHEMA = FeatureSchema(actions=4, item_features=FEATURES, user_features=FEATURES)
DTYPE = user_dtype(SCHEMA)
KEYS = st.text(max_size=8)
EVENTS = st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, MAX_TIME), st.integers(0, 3)), max_size=6)


def values(features: tuple[Feature, ...]) -> st.SearchStrategy[dict[str, Value]]:
    """A value in range for some or all of the features."""
    one: dict[str, st.SearchStrategy[Value]] = {
        f.name: st.floats(width=32, allow_nan=False, allow_infinity=False)
        if f.kind == "numeric"
        else st.integers(*((-1, 2**63 - 1) if f.kind == "id" else (0, f.limit - 1)))
        for f in features
    }
    return st.fixed_dictionaries({}, optional=one)


def history(events: list[tuple[int, int, int]]) -> History:
    return History(
        np.array([event[0] for event in events], np.int64),
        np.array([event[2] for event in events], np.int32),
        np.array([event[1] for event in events], np.int64),
    )


def blob(key: str = "user", events: int = 3) -> bytes:
    row = feature_row(FEATURES, {"age": 3, "height": 1.5})
    return encode_user(key, history([(2**40 + k, k, k % 4) for k in range(events)]), row)


@settings(max_examples=150)
@given(KEYS, EVENTS, feature_groups(), st.data())
def test_a_user_comes_back_as_stored(
    key: str, events: list[tuple[int, int, int]], features: tuple[Feature, ...], data: st.DataObject
) -> None:
    row = feature_row(features, data.draw(values(features)))
    decoded = decode_user(key, encode_user(key, history(events), row), row.dtype)
    columns = (decoded.history.item_ids, decoded.history.timestamps, decoded.history.actions)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == events
    assert [column.dtype for column in columns] == [np.int64, np.int64, np.int32]
    assert decoded.features.shape == ()
    assert decoded.features.dtype == row.dtype
    assert decoded.features.tobytes() == row.tobytes()


def test_a_user_without_events_and_features_is_a_record_too() -> None:
    nothing = user_dtype(FeatureSchema())
    decoded = decode_user("", encode_user("", History.empty(), np.zeros((), nothing)), nothing)
    assert len(decoded.history) == 0
    assert decoded.features.dtype == nothing


def test_a_decoded_user_does_not_borrow_the_blobs_memory() -> None:
    memory = bytearray(blob())
    decoded = decode_user("user", memoryview(memory), DTYPE)
    memory[:] = bytes(len(memory))
    assert decoded.history.item_ids.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
    assert decoded.features["age"] == 3


@pytest.mark.parametrize("length", range(len(blob())))
def test_a_truncated_user_is_corrupt(length: int) -> None:
    with pytest.raises(CorruptRecord):
        decode_user("user", blob()[:length], DTYPE)


@settings(max_examples=50)
@given(st.binary(min_size=1, max_size=64))
def test_a_user_with_bytes_behind_it_is_corrupt(more: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode_user("user", blob() + more, DTYPE)


@pytest.mark.parametrize("bit", range(8 * 16))
def test_a_flipped_bit_in_the_header_is_corrupt(bit: int) -> None:
    flipped = bytearray(blob())
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptRecord):
        decode_user("user", bytes(flipped), DTYPE)


@settings(max_examples=100)
@given(KEYS, KEYS)
def test_another_users_record_is_corrupt(key: str, other: str) -> None:
    if key == other:
        assert len(decode_user(key, blob(other), DTYPE).history) == 3
    else:
        with pytest.raises(CorruptRecord, match="another user"):
            decode_user(key, blob(other), DTYPE)


@pytest.mark.parametrize("features", [(), FEATURES[:2], (*FEATURES, Feature("more", "numeric"))], ids=len)
def test_a_record_of_another_schema_is_corrupt(features: tuple[Feature, ...]) -> None:
    with pytest.raises(CorruptRecord, match="schema"):
        decode_user("user", blob(), user_dtype(FeatureSchema(user_features=features)))


@settings(max_examples=200)
@given(st.binary(max_size=120))
def test_random_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode_user("user", data, DTYPE)


@settings(max_examples=200)
@given(*[st.integers(0, 2**32 - 1) | st.integers(0, 20)] * 3, st.binary(max_size=80))
def test_whatever_a_header_claims_nothing_but_corrupt_is_raised(name: int, events: int, tail: int, rest: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode_user("\0" * 5, struct.pack("<4sIII", b"FLU1", name, events, tail) + rest, DTYPE)


@settings(max_examples=150)
@given(st.data())
def test_found_items_line_up_with_the_ids_asked_for(data: st.DataObject) -> None:
    dtype = item_dtype(SCHEMA)
    ids = sorted(data.draw(st.sets(st.integers(-(2**63), 2**63 - 1), max_size=10)))
    stored = [key for key in ids if data.draw(st.booleans())]
    rows = np.zeros(len(stored), dtype)
    rows["id"] = stored
    rows["age"] = np.arange(1, len(stored) + 1)
    out, found = decode_items(np.array(ids, np.int64), rows, SCHEMA.item_features)
    ages = {key: age for age, key in enumerate(stored, start=1)}
    assert out.dtype == dtype
    assert out["id"].tolist() == ids
    assert found.tolist() == [key in ages for key in ids]
    assert out["age"].tolist() == [ages.get(key, 0) for key in ids]
    assert out["maker"].tolist() == [0 if key in ages else -1 for key in ids]


@pytest.mark.parametrize(
    ("asked", "echoed"),
    [
        ([3, 5], [4]),
        ([3, 5], [9]),
        ([3, 5], [-1]),
        ([3], [2**32 + 3]),
        ([], [3]),
        ([3, 5], [3, 3]),
        ([3, 5, 7], [3, 7, 7]),
        ([3, 5], [5, 3]),
    ],
    ids=str,
)
def test_rows_that_do_not_echo_distinct_ids_asked_for_in_order_are_corrupt(asked: list[int], echoed: list[int]) -> None:
    rows = np.zeros(len(echoed), item_dtype(SCHEMA))
    rows["id"] = echoed
    with pytest.raises(CorruptRecord):
        decode_items(np.array(asked, np.int64), rows, SCHEMA.item_features)


@settings(max_examples=100)
@given(feature_groups(), st.data())
def test_a_feature_row_holds_the_values_named_and_zero_for_the_rest(
    features: tuple[Feature, ...], data: st.DataObject
) -> None:
    named = data.draw(values(features))
    row = feature_row(features, named)
    assert row.shape == ()
    nothing = {f.name: -1 if f.kind == "id" else 0 for f in features}
    assert {f.name: row[f.name].item() for f in features} == nothing | named


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("age", -1),
        ("age", 7),
        ("age", 2**32),
        ("age", 2**64 + 3),
        ("age", 3.0),
        ("age", float("nan")),
        ("age", float("inf")),
        ("maker", -2),
        ("maker", 2**63),
        ("maker", 3.0),
        ("tags", -1),
        ("tags", 2**31),
        ("tags", 2**32 + 1),
        ("tags", 1.0),
        ("height", float("nan")),
        ("height", float("inf")),
        ("height", float("-inf")),
        ("height", 1e300),
        ("height", -1e300),
        ("height", 3.5e38),
        ("height", 10**400),
        ("weight", 1),
        ("", 1),
    ],
    ids=lambda given: str(given)[:20],
)
def test_a_value_outside_its_feature_or_of_no_feature_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError):
        feature_row(FEATURES, {name: value})


def test_the_largest_values_of_each_feature_are_kept() -> None:
    largest = float(np.finfo(np.float32).max)
    row = feature_row(FEATURES, {"age": 6, "tags": 2**31 - 1, "height": -largest, "maker": 2**63 - 1})
    assert row.item() == (6, 2**31 - 1, -largest, 2**63 - 1)


def test_a_feature_row_of_no_features_takes_no_space() -> None:
    assert feature_row((), {}).nbytes == 0
    assert UserRecord(History.empty(), feature_row((), {})).features.shape == ()


@given(data=st.data())
def test_rows_are_checked_as_each_feature_checks_its_own(data: st.DataObject) -> None:
    """Columns are looked at together; each value, also a bad one, must count as it does alone."""
    drawn = data.draw(
        st.lists(
            st.sampled_from(
                [("categorical", 5), ("categorical", 2**31 - 1), ("bits", 31), ("bits", 3), ("numeric", 0), ("id", 7)]
            ),
            max_size=6,
        )
    )
    features = tuple(Feature(f"f{n}", kind, size) for n, (kind, size) in enumerate(drawn))  # type: ignore[arg-type]
    rows = np.zeros(data.draw(st.integers(0, 5)), item_dtype(FeatureSchema(item_features=features)))
    values = [-(2**31), -2, -1, 0, 4, 5, 7, 8, 2**31 - 1]
    for feature in features if len(rows) else ():
        chosen = [0.0, 1.5, np.nan, np.inf, -np.inf] if feature.kind == "numeric" else values
        rows[feature.name] = data.draw(st.lists(st.sampled_from(chosen), min_size=len(rows), max_size=len(rows)))
    bad = [f.name for f in features if not f.fits(rows[f.name])]
    if bad:
        with pytest.raises(ValueError, match=bad[0]):
            check_rows(features, rows)
    else:
        check_rows(features, rows)
