"""The items that thread blocks work off one after another: tiles of rows, and of each a part of the columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS, TILE


class Item(NamedTuple):
    """What is to be done: where it lies in the blocks, in the rows and in the columns."""

    block: jax.Array
    row: jax.Array
    column: jax.Array


@dataclass(frozen=True)
class Items:
    """An output [blocks, rows, parts * columns], cut. The kernel's grid is one axis, "block", of `clusters`.

    Attributes:
        rows: of each block, at least 64.
        parts: of the columns.
        columns: of a part.
        warpgroups: that compute, 64 rows each, in a thread block.
        cluster: thread blocks that do one item together, of rows that follow each other.
    """

    blocks: int
    rows: int
    parts: int
    columns: int
    warpgroups: int
    cluster: int

    @property
    def tiles(self) -> int:
        """Of a cluster's rows, in each block."""
        return -(-self.rows // (TILE * self.warpgroups * self.cluster))

    @property
    def total(self) -> int:
        """Items: every tile's rows and every part of the columns."""
        return self.blocks * self.tiles * self.parts

    @property
    def clusters(self) -> int:
        """Of thread blocks, that share the items."""
        return min(self.total, max(1, MULTIPROCESSORS // self.cluster))

    def count(self) -> jax.Array:
        """Items that this cluster does."""
        return lax.div(self.total - lax.axis_index("block") + (self.clusters - 1), self.clusters)

    def at(self, n: jax.Array) -> Item:
        """This cluster's item n, with the rows of this thread block of it."""
        number = lax.axis_index("block") + n * self.clusters
        tile, part = lax.div(number, self.parts), lax.rem(number, self.parts)
        place = lax.rem(tile, self.tiles) * self.cluster + lax.axis_index("cluster")
        return Item(lax.div(tile, self.tiles), place * (TILE * self.warpgroups), part * self.columns)

    def row(self, item: Item, group: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Whether a warpgroup has rows, and its first one: of the last 64 once more where it has none."""
        wanted = item.row + group * TILE
        return wanted < self.rows, pl.multiple_of(jnp.minimum(wanted, self.rows - TILE), TILE)
