"""External int64 ids, of items and of id features, to embedding rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flame_jax.schema import FeatureSchema
from flame_jax.workspace import Workspace

UNKNOWN_ROW = 0
SEARCHED = 1 << 16
"""Keys that a search goes through in the processor's caches; for more there is an index."""
_SEARCHED_AT_ONCE = 512
"""Ids of one search, whose results NumPy allocates."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: products with it, modulo 2^64, are spread evenly and all differ."""


class _Index:
    """Finds a key's row in few places of memory, whatever the keys: by its product with a constant, not by itself.

    Products are sorted; a table says where those begin that share their first bits, of which there is one or none as
    a rule.

    Args:
        keys: int64[n], sorted and distinct.
    """

    def __init__(self, keys: np.ndarray) -> None:
        mixed = keys.astype(np.uint64) * _ODD
        order = np.argsort(mixed)
        bits = int(keys.size).bit_length()
        self._shift = np.uint64(64 - bits)
        begins = np.searchsorted(mixed[order], np.arange(1 << bits, dtype=np.uint64) << self._shift)
        self._begins = begins.astype(np.int32)
        # Behind the last product stands the largest number, which is no key's unless its row is not 0.
        self._mixed = np.append(mixed[order], np.iinfo(np.uint64).max)
        self._rows = np.append(order + 1, UNKNOWN_ROW).astype(np.int32)

    def look_up(self, ids: np.ndarray, rows: np.ndarray, space: Workspace) -> None:
        """See `Vocabulary.look_up`."""
        names = ("index wanted", "index there", "index at")
        wanted, there, places = (space.array(name, len(ids), np.uint64) for name in names)
        at = places.view(np.int64)
        np.multiply(ids.view(np.uint64), _ODD, out=wanted)
        np.right_shift(wanted, self._shift, out=places)
        # All are in range: with "raise", NumPy would copy what it takes once more.
        self._begins.take(at, out=rows, mode="clip")
        at[:] = rows
        self._mixed.take(at, out=there, mode="clip")
        smaller = np.flatnonzero(there < wanted)
        while smaller.size:
            at[smaller] += 1
            following = self._mixed.take(at[smaller])
            there[smaller] = following
            smaller = smaller[following < wanted[smaller]]
        self._rows.take(at, out=rows, mode="clip")
        rows[there != wanted] = UNKNOWN_ROW


class Vocabulary:
    """A fixed set of ids; row 0 is out-of-vocabulary, the k-th smallest id has row k + 1.

    Args:
        ids: int64[n], distinct and not negative.

    Raises:
        ValueError: ids repeat or are negative, or there are more than an int32 can number.
    """

    def __init__(self, ids: np.ndarray) -> None:
        keys = np.sort(np.asarray(ids, dtype=np.int64))
        if keys.ndim != 1 or (keys.size and keys[0] < 0) or (np.diff(keys) == 0).any():
            raise ValueError("a vocabulary needs distinct, non-negative ids on one axis")
        if keys.size > 2**31 - 2:
            raise ValueError(f"a vocabulary holds at most 2**31 - 2 ids, not {keys.size}")
        self.keys = keys
        self._dense = bool(keys.size) and int(keys[-1] - keys[0]) == keys.size - 1
        self._index = _Index(keys) if keys.size > SEARCHED and not self._dense else None

    @property
    def rows(self) -> int:
        """Embedding rows, the out-of-vocabulary one included."""
        return len(self.keys) + 1

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """int64[...] ids -> int32[...] rows; compared as 64-bit integers, unknown ids give row 0."""
        rows = np.empty(np.shape(ids), np.int32)
        self.look_up(np.asarray(ids, np.int64).ravel(), rows.ravel(), Workspace())
        return rows

    def look_up(self, ids: np.ndarray, rows: np.ndarray, space: Workspace) -> None:
        """The same of int64[n] into int32[n], with memory of `space` for what comes between."""
        if not len(self.keys):
            rows.fill(UNKNOWN_ROW)
        elif self._dense:  # no search
            at = space.array("dense", len(ids), np.int64)
            np.subtract(ids, self.keys[0], out=at)
            unknown = at.view(np.uint64) >= len(self.keys)  # so are those before the first, as unsigned numbers
            at += 1
            rows[:] = at
            rows[unknown] = UNKNOWN_ROW
        elif self._index is not None:
            self._index.look_up(ids, rows, space)
        else:
            for low in range(0, len(ids), _SEARCHED_AT_ONCE):
                some, found = ids[low : low + _SEARCHED_AT_ONCE], rows[low : low + _SEARCHED_AT_ONCE]
                at = np.searchsorted(self.keys, some)
                np.minimum(at, len(self.keys) - 1, out=at)
                unknown = self.keys[at] != some
                at += 1
                found[:] = at
                found[unknown] = UNKNOWN_ROW

    @classmethod
    def of_most_frequent(cls, keys: np.ndarray, size: int) -> Vocabulary:
        """The `size` most frequent of int64[n] keys that are not negative; of equally frequent ones the smaller."""
        ids, counts = np.unique(keys[keys >= 0], return_counts=True)
        return cls(ids[np.argsort(-counts, kind="stable")[:size]])

    def save(self, file: Path | BinaryIO) -> None:
        """Write the ids as a .npy file."""
        np.save(file, self.keys, allow_pickle=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> Vocabulary:
        """Inverse of `save`. Raises ValueError for anything else."""
        try:
            keys = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # NumPy raises half a dozen kinds on damaged bytes
            raise ValueError(f"not a .npy file: {error}") from error
        if not isinstance(keys, np.ndarray) or keys.dtype != np.int64:
            raise ValueError("vocabulary does not hold int64 ids")
        return cls(keys)


class Vocabularies(NamedTuple):
    """Every vocabulary of one model.

    Attributes:
        items: item ids.
        features: keys of each `id` feature, by its full name (`schema.feature_field`).
    """

    items: Vocabulary
    features: Mapping[str, Vocabulary]

    def check(self, schema: FeatureSchema) -> None:
        """Raise ValueError unless there is one, within its size, for each `id` feature and for nothing else."""
        sizes = {name: feature.size for name, feature in schema.id_features.items()}
        if set(sizes) != set(self.features):
            raise ValueError(f"vocabularies of {sorted(self.features)} do not fit id features {sorted(sizes)}")
        for name, size in sizes.items():
            if len(self.features[name].keys) > size:
                raise ValueError(
                    f"the vocabulary of {name} has {len(self.features[name].keys)} ids, its size is {size}"
                )
