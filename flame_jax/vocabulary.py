"""External int64 item ids to embedding rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

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
        """int64[n] ids -> int32[n] rows; compared as 64-bit integers, unknown ids give row 0."""
        if not len(self.keys):
            return np.zeros(len(ids), np.int32)
        at = np.minimum(np.searchsorted(self.keys, ids), len(self.keys) - 1)
        return np.where(self.keys[at] == ids, at + 1, UNKNOWN_ROW).astype(np.int32)

    def save(self, path: Path) -> None:
        """Write the ids as a .npy file."""
        np.save(path, self.keys, allow_pickle=False)

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
