"""Columns of a log as what they mean: ids, users, times, actions and side features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flame_jax.data.columns import Column
from flame_jax.data.keys import stable_keys
from flame_jax.packing import MAX_TIME
from flame_jax.pda.store import MAX_USER_KEY, usable_key
from flame_jax.schema import NO_KEY, Feature

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_PLAUSIBLE = 10**8
"""Seconds since the epoch of 1973: what is older is no time of a log, but perhaps one in another unit."""


class Times(NamedTuple):
    """When events happened.

    Attributes:
        clock: [n] int64 or float64 in the column's own unit, by which events are ordered.
        seconds: int64[n] since the epoch, as they are stored.
    """

    clock: np.ndarray
    seconds: np.ndarray


def times(column: Column, unit: str) -> Times:
    """Times from integers or floats in `unit`, from timestamps (UTC without a zone) or from dates.

    Raises:
        DataError: a null, another type, or a time outside [0, 2**31) seconds.
    """
    column.refuse_nulls()
    values = column.values
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(values.type):
        unit = values.type.unit
        clock = values.cast(pa.int64()).to_numpy()
    elif column.is_integer:
        clock = column.integers()
    elif pa.types.is_float64(values.type):
        clock = values.to_numpy()
    else:
        raise column.mistyped("integers or 64-bit floats in data.time_unit, timestamps or dates")
    with np.errstate(invalid="ignore"):  # of an infinite time
        seconds = clock // _PER_SECOND[unit]
    outside = ~((seconds >= 0) & (seconds <= MAX_TIME))  # so that NaN is outside
    if outside.any():
        row = int(outside.argmax())
        own = pa.types.is_integer(values.type) or column.is_floating
        hint = _fitting_unit(clock[row]) if own else ""
        try:
            shown = str(column.values[row])
        except ValueError:  # a timestamp that Python's calendar lacks
            shown = f"{clock[row]} {unit} from the epoch"
        raise column.at(row, f"is {shown}: outside [0, 2**31) seconds since the epoch{hint}")
    return Times(clock, seconds.astype(np.int64))


def _fitting_unit(time: float) -> str:
    for unit, per_second in _PER_SECOND.items():
        if _PLAUSIBLE <= time / per_second <= MAX_TIME:
            return f"; data.time_unit {unit} would fit"
    return ""


def actions(column: Column, names: Sequence[str | int | float], count: int) -> np.ndarray:
    """int32[n] action ids.

    Args:
        column: values out of `names`, or integers in [0, count) when there are none.
        names: value of each action, in the schema's order. Where one is text, all are compared as text.
        count: number of actions of the schema.

    Raises:
        DataError: a null, a type that can't hold the names, or another value.
    """
    column.refuse_nulls()
    if not names:
        if not (column.is_integer or column.is_boolean):
            raise column.mistyped(f"integers in [0, {count}), or be named in data.actions")
        ids = column.integers()
        outside = (ids < 0) | (ids >= count)
        if outside.any():
            row = int(outside.argmax())
            raise column.at(row, f"is {ids[row]}, outside [0, {count})")
        return ids.astype(np.int32)
    known = _action_of_value(column, names)
    encoded = column.values.dictionary_encode().combine_chunks()
    table = np.array([known.get(value, -1) for value in encoded.dictionary.to_pylist()], np.int32)
    actions: np.ndarray = table[encoded.indices.to_numpy()]
    if (actions < 0).any():
        row = int((actions < 0).argmax())
        raise column.at(row, f"is {column.values[row].as_py()!r:.60}, not one of data.actions {list(names)}")
    return actions


def _action_of_value(column: Column, names: Sequence[str | int | float]) -> dict[str | float, int]:
    if any(isinstance(name, str) for name in names):
        if not column.is_text:
            raise column.mistyped("strings, as data.actions are; write numbers there without quotes")
        return {str(name): action for action, name in enumerate(names)}
    if column.is_floating:  # 0.1 in a column of 32-bit floats is another number than 0.1 in the settings
        kind = column.values.type.to_pandas_dtype()
        return {float(kind(name)): action for action, name in enumerate(names)}
    if not (column.is_integer or column.is_boolean):
        raise column.mistyped("numbers, as data.actions are; quote them there if they are text")
    return {name: action for action, name in enumerate(names)}


def users(column: Column) -> tuple[np.ndarray, list[str]]:
    """Codes int32[n] and the distinct keys that they index.

    Raises:
        DataError: a null, another type than strings or integers, or a key that is empty or too long.
    """
    column.refuse_nulls()
    if not (column.is_text or column.is_integer):
        raise column.mistyped("strings or integers")
    codes, names = column.encoded()
    bad = [code for code, name in enumerate(names) if not usable_key(name)]
    if bad:
        row = int((codes == bad[0]).argmax())
        raise column.at(
            row, f"is {names[bad[0]][:40]!r}: it must have 1..{MAX_USER_KEY} bytes of UTF-8 and no control characters"
        )
    return codes, names


def item_ids(columns: Sequence[Column]) -> tuple[list[np.ndarray], dict[int, str] | None]:
    """int64[n] ids of each column, and the text of each id where some column holds strings.

    Integers beside a column of strings count as their decimal text.

    Raises:
        DataError: a null, another type, an id that is negative or empty, or two strings with one key.
    """
    for column in columns:
        column.refuse_nulls()
        if not (column.is_text or column.is_integer) and len(column):
            raise column.mistyped("integers or strings")
        if column.is_text and pc.any(empty := pc.equal(column.values, "")).as_py():
            raise column.at(int(empty.to_numpy().argmax()), "is empty")
    if any(column.is_text and len(column) for column in columns):
        return _hashed(columns)
    found = [column.integers() if len(column) else np.empty(0, np.int64) for column in columns]
    for column, ids in zip(columns, found, strict=True):
        if (ids < 0).any():
            row = int((ids < 0).argmax())
            raise column.at(row, f"is {ids[row]}: it must not be negative")
    return found, None


def feature_values(column: Column, feature: Feature) -> np.ndarray:
    """[n] of `Feature.stored_dtype`.

    Raises:
        DataError: a null where the kind has none, another type, or a value out of range.
    """
    if feature.kind == "id":
        return _id_values(column)
    column.refuse_nulls("; fill it in beforehand, or make the feature an id")
    if feature.kind == "numeric":
        if not (column.is_integer or column.is_floating or pa.types.is_decimal(column.values.type)):
            raise column.mistyped("integers or floats")
        with np.errstate(over="ignore"):
            values: np.ndarray = column.values.cast(pa.float64(), safe=False).to_numpy().astype(feature.stored_dtype)
        outside, limit = ~np.isfinite(values), "not a finite 32-bit float"
    else:
        if not (column.is_integer or column.is_boolean):
            raise column.mistyped("integers or booleans")
        values = column.integers()
        outside, limit = (values < 0) | (values >= feature.limit), f"outside [0, {feature.limit})"
    if outside.any():
        row = int(outside.argmax())
        raise column.at(row, f"is {column.values[row]}, {limit}")
    return values.astype(feature.stored_dtype)


def _id_values(column: Column) -> np.ndarray:
    if column.values.null_count == len(column):
        return np.full(len(column), NO_KEY, np.int64)
    if column.is_text:
        (values,), _ = _hashed([column])
        return values
    if not column.is_integer:
        raise column.mistyped("integers or strings")
    values = column.integers(NO_KEY)
    outside = (values < 0) & ~column.nulls()
    if outside.any():
        row = int(outside.argmax())
        raise column.at(row, f"is {values[row]}: it must not be negative; leave it null if there is none")
    return values


def _hashed(columns: Sequence[Column]) -> tuple[list[np.ndarray], dict[int, str]]:
    """Stable keys of each column's text, NO_KEY for nulls, and the text of each key."""
    role = columns[0].role
    encoded = [column.encoded() for column in columns]
    texts = list(dict.fromkeys(chain.from_iterable(distinct for _, distinct in encoded)))
    keys = dict(zip(texts, stable_keys(texts, role).tolist(), strict=True))
    print(f"{role} in column {columns[0].name!r} is text: {len(texts)} distinct ones were hashed to int64 (stable_key)")
    # A null's code is -1: it reads the last row.
    found = [np.array([*(keys[text] for text in distinct), NO_KEY], np.int64)[codes] for codes, distinct in encoded]
    return found, {key: text for text, key in keys.items()}
