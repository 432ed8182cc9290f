"""The packed batch: several requests on one token axis, filled from both ends. Pure NumPy.

Histories are laid from the left, candidates from the right, each start aligned to `Layout.align`. A bucket
`(tokens, candidates)` keeps every candidate in its last `candidates` rows, so "candidate rows" is a static
slice. Each request has one row of `row_width(blocks)` int32 words; there is no mask tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flame_jax.schema import FeatureSchema, feature_field

# Columns of a request's row. One history length per block follows.
HISTORY_START, CANDIDATE_START, CANDIDATE_COUNT, SCENARIO, REQUEST_TIME, HISTORY_LENGTH = range(6)

MAX_TIME = 2**31 - 1
"""Times are int32 seconds since the epoch; the difference of two fits an int32."""


class Bucket(NamedTuple):
    """The static shape an executable accepts."""

    tokens: int
    candidates: int

    def __str__(self) -> str:
        return f"t{self.tokens}_c{self.candidates}"


class Extent(NamedTuple):
    """Rows that a request, or one piece of it, takes: the longest block's history, and candidates."""

    history: int
    candidates: int


class Place(NamedTuple):
    """Where a piece starts on the token axis."""

    history_start: int
    candidate_start: int


@dataclass(frozen=True)
class Layout:
    """Constants of an artifact, the same for each of its buckets.

    Attributes:
        align: every history and candidate start is a multiple of this.
        max_requests: request rows of a slot (R_max).
    """

    align: int = 64
    max_requests: int = 32

    def __post_init__(self) -> None:
        if self.align < 1 or self.align & (self.align - 1):
            raise ValueError(f"layout.align must be a power of two, not {self.align}")
        if self.max_requests < 1:
            raise ValueError(f"layout.max_requests must be at least 1, not {self.max_requests}")

    def aligned(self, rows: int) -> int:
        """`rows` rounded up to a multiple of `align`."""
        return -(-rows // self.align) * self.align

    def aligned_extent(self, extent: Extent) -> Extent:
        """Both parts rounded up."""
        return Extent(self.aligned(extent.history), self.aligned(extent.candidates))


def row_width(blocks: int) -> int:
    """Words in a request's row: five fields and one history length per block."""
    return HISTORY_LENGTH + blocks


def fits(extents: Sequence[Extent], bucket: Bucket, layout: Layout) -> bool:
    """Whether these pieces fit one slot of `bucket` together."""
    aligned = [layout.aligned_extent(e) for e in extents]
    candidates = sum(e.candidates for e in aligned)
    return (
        len(extents) <= layout.max_requests
        and candidates <= bucket.candidates
        and candidates + sum(e.history for e in aligned) <= bucket.tokens
    )


def place(extents: Sequence[Extent], bucket: Bucket, layout: Layout) -> list[Place]:
    """Lay pieces out in order, histories from the left and candidates from the right.

    Raises:
        ValueError: the pieces do not fit `bucket`.
    """
    left, right = 0, bucket.tokens
    places = []
    for history, candidates in extents:
        right -= layout.aligned(candidates)
        places.append(Place(left, right))
        left += layout.aligned(history)
    if left > right or bucket.tokens - right > bucket.candidates or len(extents) > layout.max_requests:
        raise ValueError(f"{len(extents)} pieces do not fit bucket {bucket}: {list(extents)}")
    return places


@dataclass(frozen=True)
class Field:
    """One array inside a slot: where it starts, in 4-byte words, and what it holds."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def words(self) -> int:
        """Length in 4-byte words."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class SlotLayout:
    """Every field of a slot of one bucket, packed into one int32 buffer."""

    bucket: Bucket
    fields: tuple[Field, ...]
    words: int

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Named NumPy views on `buffer` int32[words]; writing one writes the slot."""
        return {f.name: buffer[f.offset : f.offset + f.words].view(f.dtype).reshape(f.shape) for f in self.fields}


def check_bucket(bucket: Bucket, layout: Layout) -> None:
    """Raise ValueError unless the bucket holds candidates, and is made of whole tiles."""
    tokens, candidates = bucket
    if not 0 < candidates <= tokens or tokens % layout.align or candidates % layout.align:
        raise ValueError(
            f"bucket {bucket} must hold 0 < candidates <= tokens, both multiples of {layout.align} "
            f"(layout.align = {layout.align})"
        )


FIELD_WORDS = 64
"""Fields begin at multiples of so many words: programs hand them to kernels in place, which want 256 bytes."""


def slot_layout(
    schema: FeatureSchema, layout: Layout, bucket: Bucket, *, host_words: int = 0, hot: bool = False
) -> SlotLayout:
    """Derive the slot of `bucket` from the schema.

    Fields: `rows` int32[R_max, 5 + blocks]; `item`, `action`, `time` int32[blocks, T]; `item.<name>`
    [C_max] of item features that travel; `user.<name>` and `context.<name>` [R_max]; with `host_words`,
    `embedding` int32[blocks, T, host_words], the rows of an item table in host memory; with `hot`, `hot`
    int32[blocks, T], the places of rows that the device holds, -1 for those that came with the slot.

    Raises:
        ValueError: the bucket is not a positive multiple of the alignment.
    """
    check_bucket(bucket, layout)
    tokens, candidates = bucket
    blocks, requests = len(schema.blocks), layout.max_requests
    int32 = np.dtype("<i4")
    shapes: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = [
        ("rows", (requests, row_width(blocks)), int32),
        ("item", (blocks, tokens), int32),
        ("action", (blocks, tokens), int32),
        ("time", (blocks, tokens), int32),
    ]
    for group, feature in schema.slot_features:
        length = candidates if group == "item" else requests
        shapes.append((feature_field(group, feature), (length,), feature.dtype))
    if hot:
        shapes.append(("hot", (blocks, tokens), int32))
    if host_words:
        shapes.append(("embedding", (blocks, tokens, host_words), int32))
    fields, offset = [], 0
    for name, shape, dtype in shapes:
        field = Field(name, offset, shape, dtype)
        fields.append(field)
        offset += -(-field.words // FIELD_WORDS) * FIELD_WORDS
    return SlotLayout(bucket, tuple(fields), offset)
