"""What is static about the kernel of an HSTU layer's part after its attention, and what it holds."""

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
        columns: of the output, that a thread block computes at once.
        stages: tiles of weights, 64 x `columns`, in flight; at least 2.
        pieces: of o or u, 64 columns of all rows, in flight; at least 2.
        cluster: thread blocks, of rows that follow each other, that every tile of weights is fetched for at once.
    """

    warpgroups: int = 2
    columns: int = 256
    stages: int = 3
    pieces: int = 4
    cluster: int = 1


@dataclass(frozen=True)
class Form:
    """Everything static about one kernel; `whole`: u, o and the gated rows are multiplied, not the gated ones alone."""

    blocks: int
    rows: int
    first: int
    values: int
    width: int
    whole: bool
    epsilon: float
    dtype: Any
    tiling: Tiling
    interpret: bool

    @property
    def steps(self) -> int:
        """Pieces of 64 that a row of o is cut into."""
        return self.values // TILE

    @property
    def turns(self) -> int:
        """Pieces that come by for one item: every one of o, then u and o in turns."""
        return 3 * self.steps

    @property
    def products(self) -> int:
        """Tiles of weights that come by for one item."""
        return self.turns if self.whole else self.steps

    @property
    def items(self) -> Items:
        """A tile's rows and one part of the columns."""
        tiling = self.tiling
        parts = self.width // tiling.columns
        return Items(self.blocks, self.rows, parts, tiling.columns, tiling.warpgroups, tiling.cluster)


class Memory(NamedTuple):
    """Shared: rings of pieces and weights; x, then the result, of every warpgroup; gated pieces in the interpreter."""

    pieces: Any
    weights: Any
    x: Any
    gated: Any


class Barriers(NamedTuple):
    """Of either ring's slots, and of each warpgroup's x: arrived, and used up."""

    piece_ready: Any
    piece_free: Any
    ready: Any
    free: Any
    x_ready: Any
    x_free: Any


class Operands(NamedTuple):
    """In global memory, in the order of the kernel's arguments; the layer's number is read already."""

    layer: jax.Array
    scale: Any
    shift: Any
    o: Any
    u: Any
    x: Any
    weights: Any
    out: Any
