"""Negatives for logs that hold only what people took: items that others took in the same period."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flame_jax.request import History

NO_ITEM = -1
"""Stands for a negative that could not be drawn; it becomes no candidate."""

_ROUNDS = 20


class NegativeSampler:
    """Draws items by their popularity in the period of an event.

    The item of a random event of the same period, whoever's it is; so a popular item is as frequent among the
    negatives as it is among the positives, and popularity alone tells nothing. An item that the user took in
    that period is no negative.

    Args:
        histories: every user's events.
        period: seconds.
        pooled: int64[users], how many of each user's events items are drawn from; None for all. An event beyond
            them has negatives too, if its period has pooled events.
    """

    def __init__(self, histories: Sequence[History], period: int, pooled: np.ndarray | None = None) -> None:
        lengths = np.array([len(h) for h in histories])
        self._ends = np.cumsum(lengths)
        joined = [np.concatenate([getattr(h, name) for h in histories]) for name in ("item_ids", "timestamps")]
        self._item_ids, items = np.unique(joined[0], return_inverse=True)
        _, self._periods = np.unique(joined[1] // period, return_inverse=True)
        self._period_count = int(self._periods.max(initial=-1)) + 1
        self._users = np.repeat(np.arange(len(histories)), lengths)
        position = np.arange(len(items)) - np.repeat(self._ends - lengths, lengths)
        pool = np.flatnonzero(position < (lengths if pooled is None else pooled)[self._users])
        order = pool[np.argsort(self._periods[pool], kind="stable")]
        self._items_by_period = items[order]
        self._count = np.bincount(self._periods[pool], minlength=self._period_count)
        self._first = np.cumsum(self._count) - self._count
        # What is held out must not show, not even by what is not drawn.
        self._taken = np.unique(self._key(self._users[pool], self._periods[pool], items[pool]))

    def _key(self, users: np.ndarray, periods: np.ndarray, items: np.ndarray) -> np.ndarray:
        key: np.ndarray = (users * self._period_count + periods) * len(self._item_ids) + items
        return key

    def draw(self, count: int, random: np.random.Generator) -> list[np.ndarray]:
        """Per user int64[events, count] external item ids, NO_ITEM where none was found."""
        users, periods = (np.repeat(of, count) for of in (self._users, self._periods))
        drawn = np.full(len(users), NO_ITEM, np.int64)
        left = np.flatnonzero(self._count[periods])
        for _ in range(_ROUNDS):
            spot = self._first[periods[left]] + random.integers(0, self._count[periods[left]])
            items = self._items_by_period[spot]
            key = self._key(users[left], periods[left], items)
            at = np.minimum(np.searchsorted(self._taken, key), len(self._taken) - 1)
            good = self._taken[at] != key
            drawn[left[good]] = self._item_ids[items[good]]
            left = left[~good]
            if not len(left):
                break
        return np.split(drawn.reshape(-1, count), self._ends[:-1])
