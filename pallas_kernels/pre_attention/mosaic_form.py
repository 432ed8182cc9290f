"""What is static about the kernel of an HSTU layer's part before its attention, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from flame_jax.pallas_kernels.hopper import TILE
from flame_jax.pallas_kernels.items import Items


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        warpgroups: that compute, 64 rows each.
        chunk: columns that a warpgroup computes at once.
        stages: tiles of weights, 64 x `chunk`, in flight; at least 2.
        pieces: of x, 64 columns of all rows, in flight.
        parts: thread blocks that share the columns of the same rows.
        cluster: thread blocks, of rows that follow each other, that every tile of weights is fetched for at once.
    """

    warpgroups: int = 2
    chunk: int = 128
    stages: int = 8
    pieces: int = 4
    parts: int = 1
    cluster: int = 1


@dataclass(frozen=True)
class Form:
    """Everything static about one kernel."""

    blocks: int
    rows: int
    width: int
    sizes: tuple[int, ...]
    activated: int
    epsilon: float
    dtype: Any
    tiling: Tiling
    interpret: bool

    @property
    def steps(self) -> int:
        """Pieces of 64 that a row is cut into."""
        return self.width // TILE

    @property
    def chunks(self) -> int:
        """That one item has."""
        return sum(self.sizes) // (self.tiling.chunk * self.tiling.parts)

    @property
    def items(self) -> Items:
        """A tile's rows and one part of the columns."""
        tiling = self.tiling
        columns = self.chunks * tiling.chunk
        return Items(self.blocks, self.rows, tiling.parts, columns, tiling.warpgroups, tiling.cluster)


class Memory(NamedTuple):
    """Shared: rings of pieces and weights; a chunk on its way out; normed rows in the interpreter."""

    pieces: Any
    weights: Any
    out: Any
    rows: Any


class Barriers(NamedTuple):
    """Of either ring's slots: arrived, and used up."""

    piece_ready: Any
    piece_free: Any
    ready: Any
    free: Any


class Operands(NamedTuple):
    """In global memory, in the order of the kernel's arguments; the layer's number is read already."""

    layer: jax.Array
    scale: Any
    shift: Any
    bias: Any
    x: Any
    weights: Any
    outputs: tuple[Any, ...]
