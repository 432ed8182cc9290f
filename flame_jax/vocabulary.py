"""External int64 ids, of items and of id features, to embedding rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flame_jax.schema import FeatureSchema

UNKNOWN_ROW = 0


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

    @property
    def rows(self) -> int:
        """Embedding rows, the out-of-vocabulary one included."""
        return len(self.keys) + 1

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """int64[...] ids -> int32[...] rows; compared as 64-bit integers, unknown ids give row 0."""
        if not len(self.keys):
            return np.zeros(np.shape(ids), np.int32)
        at = np.minimum(np.searchsorted(self.keys, ids), len(self.keys) - 1)
        return np.where(self.keys[at] == ids, at + 1, UNKNOWN_ROW).astype(np.int32)

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
