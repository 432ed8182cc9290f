"""One ranking request and its answer on the host. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flame_jax.packing import MAX_TIME


@dataclass(frozen=True)
class History:
    """A user's events, oldest first.

    Attributes:
        item_ids: int64[n], external item ids.
        actions: int32[n].
        timestamps: int64[n], seconds since the epoch, never falling.
    """

    item_ids: np.ndarray
    actions: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.item_ids)

    def check(self, actions: int) -> None:
        """Raise ValueError unless columns agree in length, ids, actions and times are in range, and time never falls.

        Args:
            actions: number of action types of the schema.
        """
        if not len(self.item_ids) == len(self.actions) == len(self.timestamps):
            raise ValueError("history columns have different lengths")
        if not len(self):
            return
        if self.item_ids.min() < 0:
            raise ValueError("history has a negative item id")
        if self.actions.min() < 0 or self.actions.max() >= actions:
            raise ValueError(f"history has an action outside [0, {actions})")
        if self.timestamps[0] < 0 or self.timestamps[-1] > MAX_TIME:
            raise ValueError("history has a time outside [0, 2**31) seconds since the epoch")
        if (self.timestamps[1:] < self.timestamps[:-1]).any():
            raise ValueError("history is not sorted by time")

    @classmethod
    def empty(cls) -> History:
        """A cold user's history."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64))


@dataclass(frozen=True)
class RankRequest:
    """A validated request.

    Attributes:
        user: the user's key in the store.
        candidates: int64[C], external item ids, in the caller's order.
        scenario: index into the schema's scenarios.
        request_time: seconds since the epoch, in [0, 2**31); later events are not seen.
        history: events sent along, used instead of the store's.
        context: value per context feature of the schema; missing ones take their feature's default.
        item_features: [C] of `Feature.stored_dtype` per item feature that comes with the request; missing ones
            take their feature's default.
        tasks: indices of the tasks wanted, in the order wanted.
        top_k: how many best candidates of the first task to name; 0 for none.
        traffic_class: index into the server's traffic classes.
    """

    user: str
    candidates: np.ndarray
    scenario: int
    request_time: int
    history: History | None = None
    context: Mapping[str, int | float] = field(default_factory=dict)
    item_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    tasks: tuple[int, ...] = (0,)
    top_k: int = 0
    traffic_class: int = 0


@dataclass(frozen=True)
class FeatureReport:
    """What an answer says about the features it was computed from.

    Attributes:
        unknown_user: the store has no such user and no history was sent.
        truncated_history: some block of the model had more events than it reads.
        unknown_items: candidates outside the vocabulary, scored as the out-of-vocabulary row.
        missing_items: candidates without a record in the store, scored with each feature's default.
        degraded: some feature was stale or a default because the store was not waited for.
    """

    unknown_user: bool
    truncated_history: bool
    unknown_items: int
    missing_items: int
    degraded: bool = False
