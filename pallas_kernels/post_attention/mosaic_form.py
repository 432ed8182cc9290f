"""Everything static about the Mosaic GPU kernel of the row-wise rest of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flame_jax.pallas_kernels.hopper import TILE


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        warpgroups: that compute, 64 rows each.
        chunk: columns of the hidden layer, and of the next layer's q, k and v, at once.
        stages: chunks of weights in flight, of either kind; at least 2.
    """

    warpgroups: int = 2
    chunk: int = 64
    stages: int = 3


@dataclass(frozen=True)
class Form:
    """Everything static about one kernel.

    Attributes:
        rows: of each block.
        first: rows before it have no output, and no q for the following layer.
        projects: whether it computes the following layer's q, k and v.
    """

    width: int
    inner: int
    hidden: int
    rows: int
    first: int
    projects: bool
    dtype: Any
    tiling: Tiling
    interpret: bool

    @property
    def tiles(self) -> int:
        """Of all warpgroups together, in one block."""
        return -(-self.rows // (TILE * self.tiling.warpgroups))

    @property
    def vectors(self) -> tuple[int, ...]:
        """Lengths of `types.IN_MEMORY`."""
        d = self.width
        return d, d, d, self.hidden, d, d, d, self.mixed

    @property
    def mixed(self) -> int:
        """Columns of the following layer's q, k and v together."""
        return 3 * self.inner if self.projects else 0

    @property
    def attended_chunks(self) -> int:
        """Chunks of the heads' outputs, and of each of q, k and v."""
        return self.inner // self.tiling.chunk

    @property
    def hidden_chunks(self) -> int:
        """Chunks of the hidden layer."""
        return self.hidden // self.tiling.chunk

    @property
    def mixed_chunks(self) -> int:
        """Chunks of the following layer's q, k and v."""
        return self.mixed // self.tiling.chunk
