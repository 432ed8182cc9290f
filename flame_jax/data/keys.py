"""Strings as int64 keys: what an item or an `id` feature is called inside the engine when its log says text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from flame_jax.data.errors import DataError


def stable_key(s: str) -> int:
    """The key of a string, in [0, 2**63), the same everywhere and forever.

    It is the BLAKE2b hash (`digest_size=8`, no key) of the string's UTF-8 bytes, read as a big-endian integer
    whose top bit is cleared. Whoever asks for scores computes it likewise.
    """
    digest = hashlib.blake2b(s.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def stable_keys(texts: Sequence[str], what: str = "key") -> np.ndarray:
    """`stable_key` of each of n distinct strings as int64[n].

    Args:
        texts: the strings, none twice.
        what: what they name, for the message.

    Raises:
        DataError: two of them have one key. Among a million strings the odds are one in 18 million.
    """
    keys = np.fromiter(map(stable_key, texts), np.int64, len(texts))
    order = np.argsort(keys)
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    if len(same):
        one, other = sorted((texts[order[same[0]]], texts[order[same[0] + 1]]))
        raise DataError(f"{what} {one!r} and {other!r} hash to one key: rename one of them")
    return keys
