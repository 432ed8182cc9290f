"""The compact record of one request: everything its slot rows are filled from, in one int32 buffer.

A record crosses from the feature side to the dispatcher as plain memory. Its words, in order:
candidate count, scenario, request time, history length per block; user features; context features; per block
the history's item rows, actions and times; the candidates' item rows; one column per item feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flame_jax.host_table import Copy, Found, HostTable, find_held
from flame_jax.packing import Bucket, Extent, Layout, Place, place
from flame_jax.schema import FeatureSchema, feature_field
from flame_jax.workspace import BufferPool

NOTHING = -1
"""Item or action row of a history row that has none, where events are interleaved."""

_COUNT, _SCENARIO, _TIME, _LENGTHS = range(4)
_ITEM = 0
"""In `_Columns.tokens`."""


class BlockEvents(NamedTuple):
    """One block's history, oldest first: int32[n] item rows, actions and times."""

    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray


class Piece(NamedTuple):
    """Candidates [low, high) of one record, with its whole history."""

    record: np.ndarray
    low: int
    high: int


class RecordLayout:
    """Encodes records of one schema and copies them into slots.

    Args:
        item_table: embeddings of an item table in host memory, copied beside the ids.

    Attributes:
        item_table: the same.
    """

    def __init__(self, schema: FeatureSchema, item_table: HostTable | None = None) -> None:
        self.item_table = item_table
        self.blocks = len(schema.blocks)
        self.candidate_action = schema.actions
        self._stride = 2 if schema.interleave else 1
        travelling = schema.slot_features
        self._request_fields = [feature_field(group, f) for group, f in travelling if group != "item"]
        self._item_fields = [feature_field(group, f) for group, f in travelling if group == "item"]
        self._head = _LENGTHS + self.blocks
        self._body = self._head + len(self._request_fields)

    def encode(
        self,
        *,
        scenario: int,
        request_time: int,
        request_words: np.ndarray,
        blocks: Sequence[BlockEvents],
        candidates: np.ndarray,
        item_columns: Sequence[np.ndarray],
        pool: BufferPool | None = None,
    ) -> np.ndarray:
        """Build a record.

        Args:
            request_words: int32[user + context features], float features as their bits.
            blocks: one history per block of the schema.
            candidates: int32[C] item rows.
            item_columns: one int32[C] per item feature that travels, float features as their bits.
            pool: whose memory it is built in.
        """
        lengths = [len(block.items) for block in blocks]
        count = len(candidates)
        words = self._body + 3 * sum(lengths) + count * (1 + len(item_columns))
        record = np.empty(words, np.int32) if pool is None else pool.take(words)
        record[_COUNT], record[_SCENARIO], record[_TIME] = count, scenario, request_time
        record[_LENGTHS : self._head] = lengths
        record[self._head : self._body] = request_words
        np.concatenate(
            [*(part for block in blocks for part in block), candidates, *item_columns], out=record[self._body :]
        )
        return record

    def extent(self, record: np.ndarray) -> Extent:
        """Rows the whole request takes."""
        head = record[: self._head].tolist()
        return self._extent(head, head[_COUNT])

    def piece_extent(self, piece: Piece) -> Extent:
        """Rows a piece takes."""
        return self._extent(piece.record[: self._head].tolist(), piece.high - piece.low)

    def _extent(self, head: list[int], candidates: int) -> Extent:
        return Extent(max(head[_LENGTHS : self._head]) * self._stride, candidates)

    def items(self, piece: Piece) -> Iterator[np.ndarray]:
        """int32[n] item rows of a piece: of each block's history, and of its candidates."""
        lengths, at = piece.record[_LENGTHS : self._head].tolist(), self._body
        for length in lengths:
            yield piece.record[at : at + length]
            at += 3 * length
        yield piece.record[at + piece.low : at + piece.high]

    def is_whole(self, record: np.ndarray) -> bool:
        """Whether int32[n] words have the length that their head says."""
        if len(record) < self._body or (record[: self._head] < 0).any() or record[_COUNT] < 1:
            return False
        lengths = int(record[_LENGTHS : self._head].sum(dtype=np.int64))
        return len(record) == self._body + 3 * lengths + int(record[_COUNT]) * (1 + len(self._item_fields))

    def fill(
        self,
        slot: Mapping[str, np.ndarray],
        pieces: Sequence[Piece],
        bucket: Bucket,
        layout: Layout,
        places: np.ndarray | None = None,
    ) -> list[slice]:
        """Copy pieces into a slot that holds no others.

        Args:
            slot: the slot's field views, its request rows zero.
            pieces: one at least.
            places: int32[item rows], where the device holds a row of the item table, -1 where it does not; None: it
                is to hold none.

        Returns:
            Rows of the scores float32[C_max, tasks] that belong to each piece.

        Raises:
            ValueError: the pieces do not fit the bucket.
            IndexError: the item table in host memory has no such row.
        """
        heads = [piece.record[: self._body].tolist() for piece in pieces]  # plain numbers are faster one by one
        extents = [self._extent(head, high - low) for head, (_, low, high) in zip(heads, pieces, strict=True)]
        wheres = place(extents, bucket, layout)
        # Candidates lie together at the end, the first piece's last, with gaps that no request's row points at.
        first = wheres[-1].candidate_start
        slot["action"][:, first:] = self.candidate_action
        slot["time"][:, first:] = heads[0][_TIME] if len(heads) == 1 else _times(heads, wheres, bucket)
        self._write_requests(slot, 0, heads, wheres, extents)
        columns = self._columns(slot)
        copies: list[Copy] = []
        for where, head, piece in zip(wheres, heads, pieces, strict=True):
            copies += self._write_piece(slot, columns, where, head, piece, places)
        if self.item_table is not None:
            self.item_table.copy(copies)
        base = bucket.tokens - bucket.candidates
        starts = [where.candidate_start - base for where in wheres]
        return [slice(at, at + extent.candidates) for at, extent in zip(starts, extents, strict=True)]

    def write(
        self,
        slot: Mapping[str, np.ndarray],
        row: int,
        place: Place,
        record: np.ndarray,
        low: int,
        high: int,
        places: np.ndarray | None = None,
    ) -> list[Copy]:
        """Copy candidates [low, high) of a record, with its whole history, into a slot.

        Args:
            slot: the slot's field views.
            row: the request row to fill.
            place: where the piece lies on the token axis.
            places: see `fill`.

        Returns:
            What is left to be copied from the item table in host memory.
        """
        head, rows = record[: self._body].tolist(), slice(place.candidate_start, place.candidate_start + high - low)
        slot["action"][:, rows], slot["time"][:, rows] = self.candidate_action, head[_TIME]
        self._write_requests(slot, row, [head], [place], [self._extent(head, high - low)])
        return self._write_piece(slot, self._columns(slot), place, head, Piece(record, low, high), places)

    def _write_requests(
        self,
        slot: Mapping[str, np.ndarray],
        row: int,
        heads: Sequence[Sequence[int]],
        places: Sequence[Place],
        extents: Sequence[Extent],
    ) -> None:
        """Fill request rows from `row` on, and the features of these requests."""
        rows = slice(row, row + len(heads))
        slot["rows"][rows] = [
            (*place, extent.candidates, head[_SCENARIO], head[_TIME], *self._history_rows(head))
            for place, extent, head in zip(places, extents, heads, strict=True)
        ]
        for number, name in enumerate(self._request_fields, self._head):
            slot[name].view(np.int32)[rows] = [head[number] for head in heads]

    def _history_rows(self, head: Sequence[int]) -> Sequence[int]:
        lengths = head[_LENGTHS : self._head]
        return lengths if self._stride == 1 else [length * self._stride for length in lengths]

    def _columns(self, slot: Mapping[str, np.ndarray]) -> _Columns:
        """What is copied to, request by request.

        As memoryviews, whose copies keep Python's lock. NumPy gives it away for more than 500 numbers, for a
        microsecond, and may wait milliseconds until other threads give it back.
        """
        tokens = [[memoryview(row) for row in slot[name]] for name in ("item", "action", "time")]
        return _Columns(tokens, [memoryview(slot[name].view(np.int32)) for name in self._item_fields])

    def _write_piece(
        self,
        slot: Mapping[str, np.ndarray],
        columns: _Columns,
        place: Place,
        head: Sequence[int],
        piece: Piece,
        places: np.ndarray | None,
    ) -> list[Copy]:
        """Copy histories and candidates, without the candidates' actions and times."""
        copies: list[Copy] = []
        record, low, high = piece
        source = memoryview(record)
        at, start = self._body, place.history_start
        for block, length in enumerate(head[_LENGTHS : self._head]):
            items = record[at : at + length]
            if self._stride == 1:
                for of_blocks in columns.tokens:
                    of_blocks[block][start : start + length] = source[at : at + length]
                    at += length
            else:
                _interleave(slot, block, slice(start, start + 2 * length), record[at : at + 3 * length])
                at += 3 * length
            if self.item_table is not None:
                rows, found = slice(start, start + length * self._stride), _look_up(items, places)
                copies.append(_embed(slot, block, rows, self._stride, items, found))
        first, count = place.candidate_start, high - low
        for row in columns.tokens[_ITEM]:
            row[first : first + count] = source[at + low : at + high]
        if self.item_table is not None:
            candidates, rows = record[at + low : at + high], slice(first, first + count)
            found = _look_up(candidates, places)
            copies += [_embed(slot, block, rows, 1, candidates, found) for block in range(self.blocks)]
        base = slot["item"].shape[1]
        for column in columns.candidates:
            at += head[_COUNT]
            own = first - (base - len(column))
            column[own : own + count] = source[at + low : at + high]
        return copies


def _times(heads: Sequence[Sequence[int]], wheres: Sequence[Place], bucket: Bucket) -> np.ndarray:
    """int32: each candidate row's request time, from the first row of the last request on."""
    starts = [where.candidate_start for where in wheres]
    spans = [end - start for end, start in zip([bucket.tokens, *starts], starts, strict=False)]
    return np.repeat(np.array([head[_TIME] for head in reversed(heads)], np.int32), spans[::-1])


class _Columns(NamedTuple):
    """Of one slot.

    Attributes:
        tokens: `item`, `action` and `time`, of each block.
        candidates: of each item feature.
    """

    tokens: list[list[memoryview]]
    candidates: list[memoryview]


def _interleave(slot: Mapping[str, np.ndarray], block: int, rows: slice, history: np.ndarray) -> None:
    """Each event becomes two rows: its item, and then its action. `history`: int32[3 n], items, actions and times."""
    items, actions, times = history.reshape(3, -1)
    item, action, time = (slot[name][block, rows] for name in ("item", "action", "time"))
    item[::2], item[1::2] = items, NOTHING
    action[::2], action[1::2] = NOTHING, actions
    time[::2] = time[1::2] = times


def _look_up(items: np.ndarray, places: np.ndarray | None) -> Found | None:
    return None if places is None else find_held(items, places)


def _embed(
    slot: Mapping[str, np.ndarray],
    block: int,
    rows: slice,
    stride: int,
    items: np.ndarray,
    found: Found | None,
) -> Copy:
    """Name the places of items that the device holds; what is left to be copied for these rows of the token axis.

    Args:
        stride: 2 where every other row is none of an item, and embeds as zeros.
        found: of the items; None where the device is to hold none.
    """
    embedding = slot["embedding"][block, rows]
    if stride == 2:
        embedding[1::2] = 0
    if "hot" not in slot:
        return Copy(items, embedding[::stride])
    hot = slot["hot"][block, rows]
    hot[:] = -1
    if found is None:
        return Copy(items, embedding[::stride])
    hot[::stride] = found.places
    return found.copy(items, embedding[::stride])
