"""Requests for SUMI attention whose histories lie in pages, and the same ones packed into token rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flame_jax.packing import Bucket, Extent, Layout, Place, place

NOW = 1_000_000_000


@dataclass(frozen=True, eq=False)
class User:
    """A history: lengths by block; k, v [blocks, longest, heads, dim]; time int32[blocks, longest]."""

    lengths: tuple[int, ...]
    k: np.ndarray
    v: np.ndarray
    time: np.ndarray


@dataclass(frozen=True, eq=False)
class Ask:
    """A request of a user: q, k, v [blocks, candidates, heads, dim] of the candidates."""

    user: User
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scenario: int
    time: int

    @property
    def extent(self) -> Extent:
        """Rows that it takes where its history is packed, too."""
        return Extent(max(self.user.lengths), self.q.shape[1])


class Batch(NamedTuple):
    """What an attention is given; `pool` is k, v [blocks, pages, page_rows, heads, dim], table and time of `Pages`."""

    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
    rows: np.ndarray
    time: np.ndarray
    places: list[Place]
    pool: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None


class Maker:
    """Random users and requests with these heads, in numbers that `dtype` holds."""

    def __init__(self, random: np.random.Generator, *, heads: int, dim: int, dtype: Any) -> None:
        self.random, self.heads, self.dim, self.dtype = random, heads, dim, dtype

    def user(self, *lengths: int) -> User:
        blocks, rows = len(lengths), max(lengths)
        time = np.sort(self.random.integers(0, NOW, (blocks, rows))).astype(np.int32)
        return User(lengths, self._numbers(blocks, rows), self._numbers(blocks, rows), time)

    def ask(self, user: User, candidates: int) -> Ask:
        q, k, v = (self._numbers(len(user.lengths), candidates) for _ in range(3))
        return Ask(user, q, k, v, int(self.random.integers(2)), NOW + int(self.random.integers(NOW)))

    def _numbers(self, blocks: int, rows: int) -> np.ndarray:
        return np.asarray(self.random.normal(size=(blocks, rows, self.heads, self.dim)), self.dtype)


def packed(asks: Sequence[Ask], bucket: Bucket, layout: Layout) -> Batch:
    """Histories and candidates on one token axis, NaN where nobody's rows are."""
    batch = _empty(asks, bucket, layout, [ask.extent for ask in asks])
    for row, ask, where in zip(batch.rows, asks, batch.places, strict=False):
        row[0] = where.history_start
        at = slice(where.history_start, where.history_start + ask.extent.history)
        for array, own in zip(batch.arrays[1:], (ask.user.k, ask.user.v), strict=True):
            array[:, at] = own
        batch.arrays[0][:, at] = 0
        batch.time[:, at] = ask.user.time
    return batch


def paged(
    asks: Sequence[Ask], bucket: Bucket, layout: Layout, *, page_rows: int, pages: int, random: np.random.Generator
) -> Batch:
    """Candidates alone on the token axis; histories in `pages` pages in any order, NaN wherever no history is."""
    batch = _empty(asks, Bucket(bucket.candidates, bucket.candidates), layout, [Extent(0, a.q.shape[1]) for a in asks])
    blocks, _, heads, dim = asks[0].q.shape
    k, v = (np.full((blocks, pages, page_rows, heads, dim), np.nan, asks[0].q.dtype) for _ in range(2))
    time = random.integers(-(2**31), 2**31 - 1, k.shape[:3]).astype(np.int32)
    most = max(-(-ask.extent.history // page_rows) for ask in asks) + 1
    table = random.integers(0, pages, (layout.max_requests, most)).astype(np.int32)
    free, cut = random.permutation(pages).tolist(), dict[User, list[int]]()
    for row, ask in zip(table, asks, strict=False):
        if ask.user not in cut:
            cut[ask.user] = [free.pop() for _ in range(0, ask.extent.history, page_rows)]
        row[: len(cut[ask.user])] = cut[ask.user]
    for user, own in cut.items():
        for block, length in enumerate(user.lengths):
            for position in range(length):
                at = block, own[position // page_rows], position % page_rows
                k[at], v[at], time[at] = user.k[block, position], user.v[block, position], user.time[block, position]
    return batch._replace(pool=(k, v, table, time))


def _empty(asks: Sequence[Ask], bucket: Bucket, layout: Layout, extents: list[Extent]) -> Batch:
    """Candidates in their places, and request rows."""
    blocks, _, heads, dim = asks[0].q.shape
    q, k, v = (np.full((blocks, bucket.tokens, heads, dim), np.nan, asks[0].q.dtype) for _ in range(3))
    time = np.zeros((blocks, bucket.tokens), np.int32)
    rows = np.zeros((layout.max_requests, 5 + blocks), np.int32)
    places = place(extents, bucket, layout)
    for row, ask, where in zip(rows, asks, places, strict=False):
        count = ask.q.shape[1]
        row[:] = 0, where.candidate_start, count, ask.scenario, ask.time, *ask.user.lengths
        at = slice(where.candidate_start, where.candidate_start + count)
        q[:, at], k[:, at], v[:, at], time[:, at] = ask.q, ask.k, ask.v, ask.time
    return Batch((q, k, v), rows, time, places)
