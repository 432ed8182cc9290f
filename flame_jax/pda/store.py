"""The feature store as the rest of the engine sees it."""

from __future__ import annotations

import json
from typing import NamedTuple, Protocol, Self

import numpy as np

from flame_jax.pda.records import UserRecord
from flame_jax.schema import FeatureSchema

FORMAT = 1
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
        items: structured[C] (`records.item_dtype`) in the order asked; each feature's default where not found.
        found: bool[C], false where the store has no such item.
        user_lost: the store did not say whether it has the user.
        degraded: the store was not waited for: an item is too old, or a default for the moment, or `user_lost`.
    """

    user: UserRecord | None
    items: np.ndarray
    found: np.ndarray
    user_lost: bool = False
    degraded: bool = False


class Store(Protocol):
    """Reads features; one call is one round trip.

    Attributes:
        name: what messages call it; holds no password.
        description: what it says it holds.
    """

    name: str
    description: Description

    async def fetch(self, user: str | None, item_ids: np.ndarray, *, patient: bool = False) -> Fetched:
        """Features of one user and of int64[n] items, sorted and distinct.

        Args:
            patient: no call waits for the answer, so it may come late.

        Raises:
            StoreError: the store doesn't answer.
            CorruptRecord: a value is damaged or belongs to another key.
        """

    async def aclose(self) -> None:
        """Release the store; no fetch may be under way."""


class Description(NamedTuple):
    """What a store says of itself, under a key that is written last.

    Attributes:
        dataset: what it holds.
        schema: whose features its records have.
        number: of the import that made it, drawn by chance.
    """

    dataset: str
    schema: FeatureSchema
    number: str = ""

    def to_bytes(self) -> bytes:
        """As a store holds it."""
        said = {"format": FORMAT, "dataset": self.dataset, "number": self.number, "schema": self.schema.to_json()}
        return json.dumps(said).encode()

    @classmethod
    def parse(cls, blob: bytes | None, store: str) -> Self:
        """Inverse of `to_bytes`; None for a store that has none.

        Raises:
            StoreError: the store, of this name, is unfinished, damaged or of another format.
        """
        if blob is None:
            raise StoreError(f"store {store} is incomplete: its import has not finished")
        try:
            said = json.loads(blob)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise StoreError(f"store {store} has a damaged description")
        if said.get("format") != FORMAT:
            raise StoreError(f"store {store} has format {said.get('format')}, this program reads {FORMAT}")
        try:
            schema = FeatureSchema.from_json(said["schema"])
            return cls(str(said.get("dataset")), schema, str(said.get("number", "")))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"store {store} has a damaged description") from error

    def check(self, schema: FeatureSchema, store: str) -> None:
        """Raise StoreError when the records were written for a schema that stores something else."""
        if schema.store_fingerprint() != self.schema.store_fingerprint():
            raise StoreError(
                f"store {store} was written for another feature schema (actions, item or user features differ)"
            )
