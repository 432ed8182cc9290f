"""The bucket ladder: which shapes are compiled, and which of them a batch takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flame_jax.packing import Bucket, Extent, Layout, check_bucket, fits
from flame_jax.schema import FeatureSchema

Ladder = tuple[Bucket, ...]


def make_ladder(pairs: Iterable[Sequence[int]], schema: FeatureSchema, layout: Layout) -> Ladder:
    """Distinct buckets, cheapest first.

    Raises:
        ValueError: no bucket, one off the alignment, or a largest one that can't hold the longest history
            beside one candidate.
    """
    ladder = tuple(sorted({Bucket(*pair) for pair in pairs}))
    if not ladder:
        raise ValueError("export.buckets is empty")
    for bucket in ladder:
        check_bucket(bucket, layout)
    if any(bucket.candidates > ladder[-1].candidates for bucket in ladder):
        raise ValueError(f"the largest bucket {ladder[-1]} must take as many candidates as every other")
    longest = Extent(schema.history_rows, 1)
    if not fits([longest], ladder[-1], layout):
        raise ValueError(
            f"the largest bucket {ladder[-1]} cannot hold schema.block_length = {schema.block_length} events beside "
            f"one candidate at layout.align = {layout.align}"
        )
    return ladder


def capacity(bucket: Bucket, history: int, layout: Layout) -> int:
    """Most candidates of one request with `history` rows that an empty slot of `bucket` takes; may be 0."""
    return max(0, min(bucket.candidates, bucket.tokens - layout.aligned(history)))
