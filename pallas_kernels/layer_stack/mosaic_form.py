"""Everything static about the Mosaic GPU kernel of a stack of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flame_jax.pallas_kernels.hopper import TILE

HALVES = 2
"""Warpgroups that compute: each has 64 of the columns, and one of the heads."""

WIDTH = HALVES * TILE
"""Of the model, and of all heads together."""

_TILE_BYTES = HALVES * TILE * TILE * 2
_SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True)
class Tiling:
    """What `hopper.kernel` asks of a form; there is nothing to choose.

    Attributes:
        warpgroups: that compute.
    """

    warpgroups: int = HALVES


@dataclass(frozen=True)
class Form:
    """Everything static about one kernel.

    Attributes:
        layers: of the whole stack.
        first: layer of this launch.
        count: layers of this launch.
        requests: request rows.
        window: rows of the longest history, a multiple of 64.
        hidden: columns of the hidden layer.
        first_candidate: token row.
        biased: with the log bias.
        projects: whether something follows the last layer.
    """

    layers: int
    first: int
    count: int
    requests: int
    window: int
    hidden: int
    first_candidate: int
    biased: bool
    projects: bool
    dtype: Any
    interpret: bool
    tiling: Tiling = Tiling()

    @property
    def last(self) -> bool:
        """Whether the stack ends with this launch: only candidates go through the last layer."""
        return self.first + self.count == self.layers

    @property
    def first_output(self) -> int:
        """Token row of the first row of the outputs."""
        return self.first_candidate if self.last else 0

    @property
    def vectors(self) -> tuple[int, ...]:
        """Lengths of `post_attention.types.IN_MEMORY`."""
        return WIDTH, WIDTH, WIDTH, self.hidden, WIDTH, WIDTH, WIDTH, 3 * WIDTH

    @property
    def stages(self) -> int:
        """Tiles of the ring: what shared memory has room for beside the rest."""
        rest = 4 * _TILE_BYTES + 2 * 4 * sum(self.vectors) + 2 * 4 * (self.window + 2 * TILE) + 2048
        return min(8, (_SHARED_MEMORY - rest) // _TILE_BYTES)
