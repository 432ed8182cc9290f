"""How a user's history and an item's features lie in a store: packed blobs that echo their key."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from flame_jax.request import History
from flame_jax.schema import NO_KEY, Feature, FeatureSchema, default_rows, record_dtype

_HEADER = struct.Struct("<4sIIII")
_MAGIC = b"FLU2"
_ID = np.dtype("<i8")


class CorruptRecord(Exception):
    """A stored value is not what its key promises."""


class UserRecord(NamedTuple):
    """What the store knows of one user: events oldest first, and a structured[()] row of features."""

    history: History
    features: np.ndarray


def user_dtype(schema: FeatureSchema) -> np.dtype[Any]:
    """Structured dtype of a user's features."""
    return record_dtype(schema.user_features)


def item_dtype(schema: FeatureSchema) -> np.dtype[Any]:
    """Structured dtype of an item's stored row: its id, then its features."""
    return np.dtype([("id", "<i8"), *((f.name, f.stored_dtype) for f in schema.stored_item_features)])


def feature_row(features: tuple[Feature, ...], values: Mapping[str, int | float]) -> np.ndarray:
    """A structured[()] row from named values; missing ones take their feature's default.

    Raises:
        ValueError: an unknown name, or a value outside its feature's range.
    """
    row = default_rows(features, record_dtype(features), ())
    if unknown := set(values) - {f.name for f in features}:
        raise ValueError(f"unknown features {sorted(unknown)}")
    for feature in features:
        value = values.get(feature.name, feature.default)
        if feature.kind == "numeric":
            try:
                with np.errstate(over="ignore"):
                    value = float(np.float32(value))
            except OverflowError:
                value = np.inf
            if not np.isfinite(value):
                raise ValueError(f"feature {feature.name!r} is not a finite float32")
        else:
            low, high = (NO_KEY, 1 << 63) if feature.kind == "id" else (0, feature.limit)
            if isinstance(value, float) or not low <= value < high:
                raise ValueError(f"feature {feature.name!r} must be an integer in [{low}, {high})")
        row[feature.name] = value
    return row


def encode_user(key: str, history: History, features: np.ndarray) -> bytes:
    """One blob: header with a CRC-32 of the rest, key, ids int64[n], times int64[n], actions int32[n], features."""
    name, tail = key.encode(), features.tobytes()
    body = b"".join(
        (
            name,
            history.item_ids.astype("<i8").tobytes(),
            history.timestamps.astype("<i8").tobytes(),
            history.actions.astype("<i4").tobytes(),
            tail,
        )
    )
    return _HEADER.pack(_MAGIC, len(name), len(history), len(tail), zlib.crc32(body)) + body


def decode_user(key: str, blob: bytes | memoryview, dtype: np.dtype[Any]) -> UserRecord:
    """Inverse of `encode_user`.

    Raises:
        CorruptRecord: the blob is short, of another format or schema, or of another user.
    """
    if len(blob) < _HEADER.size:
        raise CorruptRecord("user record is shorter than its header")
    magic, name_length, events, tail, checksum = _HEADER.unpack_from(blob)
    if magic != _MAGIC or tail != dtype.itemsize:
        raise CorruptRecord("user record is of another format or schema")
    if len(blob) != _HEADER.size + name_length + 20 * events + tail:
        raise CorruptRecord("user record has the wrong length")
    if zlib.crc32(memoryview(blob)[_HEADER.size :]) != checksum:
        raise CorruptRecord("user record does not match its checksum")
    at = _HEADER.size + name_length
    if bytes(blob[_HEADER.size : at]) != key.encode():
        raise CorruptRecord("user record belongs to another user")

    def column(of: str) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(blob, of, events, at).copy()  # the blob is gone once its transaction ends
        at += values.nbytes
        return values

    ids, times, actions = column("<i8"), column("<i8"), column("<i4")
    row = np.frombuffer(bytes(blob[at:]), dtype).reshape(()) if tail else np.zeros((), dtype)
    return UserRecord(History(ids, actions, times), row)


def join_rows(values: Sequence[bytes | memoryview], dtype: np.dtype[Any], features: tuple[Feature, ...]) -> np.ndarray:
    """Stored item records as structured[n] rows.

    Raises:
        CorruptRecord: one has another length, or a value out of its feature's range.
    """
    if not values:
        return np.zeros(0, dtype)
    if set(map(len, values)) - {dtype.itemsize}:
        raise CorruptRecord("item record has the wrong length")
    rows = np.frombuffer(b"".join(values), dtype)
    try:
        check_rows(features, rows)
    except ValueError as error:
        raise CorruptRecord(f"item record: {error}") from error
    return rows


def decode_items(ids: np.ndarray, rows: np.ndarray, features: tuple[Feature, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Line stored rows up with the ids asked for.

    Args:
        ids: int64[n], sorted and distinct.
        rows: structured[m], m <= n, the rows found, in the order of their ids.

    Returns:
        structured[n] with the features' defaults where nothing was found, and bool[n], whether it was.

    Raises:
        CorruptRecord: a row echoes an id that was not asked for.
    """
    out = default_rows(features, rows.dtype, len(ids))
    found = np.zeros(len(ids), bool)
    if len(rows):
        if not len(ids) or (rows["id"][1:] <= rows["id"][:-1]).any():
            raise CorruptRecord("item records are not those asked for")
        at = np.minimum(np.searchsorted(ids, rows["id"]), len(ids) - 1)
        if (ids[at] != rows["id"]).any():
            raise CorruptRecord("item record belongs to another item")
        out[at] = rows
        found[at] = True
    out["id"] = ids
    return out, found


def check_rows(features: tuple[Feature, ...], rows: np.ndarray) -> None:
    """Raise ValueError unless every value of structured[...] rows lies in its feature's range."""
    if _all_fit(features, rows):
        return
    for feature in features:
        if not feature.fits(rows[feature.name]):
            raise ValueError(f"feature {feature.name!r} has a value out of range")


class _Columns(NamedTuple):
    """Where features lie in rows of 4-byte words: those with limits, and numbers; and features that are neither."""

    limited: np.ndarray
    limits: np.ndarray
    numeric: np.ndarray
    others: tuple[Feature, ...]


@lru_cache(maxsize=64)
def _columns(features: tuple[Feature, ...], dtype: np.dtype[Any]) -> _Columns:
    assert dtype.fields is not None
    words = {feature: dtype.fields[feature.name][1] // 4 for feature in features}  # all fields are of 4 or 8 bytes
    limited = [f for f in features if f.kind in ("categorical", "bits")]
    numeric = [f for f in features if f.kind == "numeric"]
    return _Columns(
        np.array([words[f] for f in limited], np.intp),
        np.array([f.limit for f in limited], np.uint32),
        np.array([words[f] for f in numeric], np.intp),
        tuple(f for f in features if f.kind == "id"),
    )


def _all_fit(features: tuple[Feature, ...], rows: np.ndarray) -> bool:
    """Whether every value lies in its feature's range; all columns of a kind at once."""
    if not rows.size or not features:
        return True
    columns = _columns(features, rows.dtype)
    if len(columns.limited) or len(columns.numeric):
        words = np.ascontiguousarray(rows).reshape(-1).view("<u4").reshape(rows.size, -1)
        if not (words[:, columns.limited] < columns.limits).all():  # as unsigned numbers, negative ones are too large
            return False
        if not np.isfinite(words.view("<f4")[:, columns.numeric]).all():
            return False
    return all(feature.fits(rows[feature.name]) for feature in columns.others)
