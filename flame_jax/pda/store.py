"""The feature store as the rest of the engine sees it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from flame_jax.pda.records import UserRecord

MAX_USER_KEY = 256
"""Bytes of a user's key in UTF-8 at most."""


def usable_key(user: str) -> bool:
    """Whether a request may name a user by this key: 1 to 256 bytes of UTF-8, no control characters."""
    return 0 < len(user.encode()) <= MAX_USER_KEY and not any(ord(c) < 32 or ord(c) == 127 for c in user)


class StoreError(Exception):
    """The store can't be opened or doesn't answer; the message is one clear line for the operator."""


class Fetched(NamedTuple):
    """One request's features.

    Attributes:
        user: None when the store has no such user, or none was asked for.
        items: structured[C] (`records.item_dtype`) in the order asked; zeros where not found.
        found: bool[C].
    """

    user: UserRecord | None
    items: np.ndarray
    found: np.ndarray


class Store(Protocol):
    """Reads features; one call is one round trip."""

    async def fetch(self, user: str | None, item_ids: np.ndarray) -> Fetched:
        """Features of one user and of int64[C] items, which may repeat.

        Raises:
            StoreError: the store doesn't answer.
            CorruptRecord: a value is damaged or belongs to another key.
        """

    def close(self) -> None:
        """Release the store; no fetch may be under way."""
