"""Everything that a server would check of an artifact, and whether its scores are invariant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flame_jax.fke.artifact import Artifact
from flame_jax.fke.engine import Engine
from flame_jax.fke.golden import whole
from flame_jax.fke.manifest import portable_name
from flame_jax.packing import Bucket, fits
from flame_jax.record import Piece


@dataclass(frozen=True)
class BucketReport:
    """What replaying the golden requests in one bucket gave.

    Attributes:
        requests: golden requests that were replayed.
        placements: launches that were compared: each request alone, and at three offsets among neighbours.
        golden: largest difference to the golden scores, see `Golden.apart`.
        moved: largest difference of one request's scores between its placements, likewise; 0 means equal bits.
        recompiled: the executable was compiled here, because the artifact's can't run on this CPU.
    """

    bucket: Bucket
    requests: int
    placements: int
    golden: float
    moved: float
    recompiled: bool

    @property
    def compared(self) -> bool:
        """Whether any request was run in more than one place; a small bucket may have no room for neighbours."""
        return self.placements > self.requests

    def passes(self, tolerance: float) -> bool:
        """Whether neither difference is beyond the artifact's tolerance."""
        return self.golden <= tolerance and self.moved <= tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return self.__dict__ | {"bucket": str(self.bucket)}


def verify(artifact: Artifact, device: jax.Device) -> list[BucketReport]:
    """Load the artifact as a server does, then replay it; every listed file is read and checked.

    Raises:
        ArtifactError: a server would refuse it.
    """
    for bucket in artifact.manifest.buckets:
        artifact.check(portable_name(bucket))  # the rest is read by the engine
    engine = Engine(artifact, device)
    engine.warm()
    return [replay(engine, bucket) for bucket in engine.slots]


def replay(engine: Engine, bucket: Bucket) -> BucketReport:
    """Score every golden request that the bucket can hold in several places, and compare.

    Each is run alone, and then first, in the middle and last among as many copies of another one as the bucket holds,
    so that it starts at offsets from one end to the other, with neighbours.
    """
    records = engine.packer.records
    # The smallest that has a history: it moves both ends.
    neighbour = min(engine.golden.records, key=lambda r: (not records.extent(r).history, sum(records.extent(r))))
    requests = placements = 0
    golden = moved = 0.0
    for record, expected in zip(engine.golden.records, engine.golden.scores, strict=True):
        piece = _fitting(engine, record, bucket)
        if piece is None:
            continue
        found = []
        for pieces, mine in _arrangements(engine, piece, whole(neighbour, records), bucket):
            words, rows = engine.packer.pack(pieces, bucket)
            found.append(engine.run(bucket, words)[rows[mine]])
        requests += 1
        placements += len(found)
        golden = max(golden, *(engine.golden.apart(scores, expected[: piece.high]) for scores in found))
        moved = max(moved, *(engine.golden.apart(scores, found[0]) for scores in found))
    return BucketReport(bucket, requests, placements, golden, moved, bucket in engine.recompiled)


def _fits(engine: Engine, pieces: Sequence[Piece], bucket: Bucket) -> bool:
    return fits([engine.packer.records.piece_extent(p) for p in pieces], bucket, engine.manifest.layout)


def _fitting(engine: Engine, record: np.ndarray, bucket: Bucket) -> Piece | None:
    """The record with all its candidates, or with one tile of them, or None where the bucket holds neither."""
    every = whole(record, engine.packer.records)
    tile = every._replace(high=min(every.high, engine.manifest.layout.align))
    return next((p for p in (every, tile) if _fits(engine, [p], bucket)), None)


def _arrangements(engine: Engine, piece: Piece, neighbour: Piece, bucket: Bucket) -> Iterator[tuple[list[Piece], int]]:
    """Batches that hold the piece, each with its position: alone; first, in the middle and last of a full bucket."""
    yield [piece], 0
    count = 0
    while _fits(engine, [piece, *[neighbour] * (count + 1)], bucket):
        count += 1
    for before in sorted({0, count // 2, count} if count else ()):
        yield [*[neighbour] * before, piece, *[neighbour] * (count - before)], before
