"""What the Mosaic GPU kernels for Hopper share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.rows import EPSILON

TILE = 64
"""Rows of a warpgroup: what one wgmma instruction takes."""

PROCESSORS = 132
"""Streaming multiprocessors of an H100."""

FULL, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Where a warpgroup's threads hold an accumulator, one number per row of it, and one per column."""

# (Registers a thread of the warpgroups that compute, of the one that loads.) More than 65536 in all never start.
_REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 24)}


def interpreter(wanted: bool) -> Any:
    """What `plgpu.kernel` takes as `interpret`. Memory starts as NaN; TMA may read beyond the end of an array."""
    return plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized") if wanted else None


def tile_memory(*lead: int, rows: int, width: int, dtype: Any) -> Any:
    """Shared memory for arrays [*lead, rows, width] as TMA writes and wgmma reads them."""
    words = jnp.dtype(dtype).itemsize
    swizzle = min(128, width * words)
    transforms = (plgpu.TilingTransform((8, swizzle // words)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((*lead, rows, width), dtype, transforms=transforms)


def few_registers(warpgroups: int, interpret: bool) -> None:
    """For the warpgroup that loads for so many others."""
    if not interpret:
        plgpu.set_max_registers(_REGISTERS[warpgroups][1], action="decrease")


def many_registers(warpgroups: int, interpret: bool) -> None:
    """For each of so many warpgroups that compute."""
    if not interpret:
        plgpu.set_max_registers(_REGISTERS[warpgroups][0], action="increase")


def per_row(x: jax.Array, like: jax.Array) -> jax.Array:
    """[rows] -> [rows, columns]."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def per_column(x: jax.Array, like: jax.Array) -> jax.Array:
    """[columns] -> [rows, columns]."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def norm_rows(y: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """LayerNorm of every row of a float32 register tile [rows, columns]; scale, shift [columns]."""
    inverse = 1.0 / y.shape[1]
    centred = y - per_row(y.sum(axis=1) * inverse, y)
    spread = lax.rsqrt((centred * centred).sum(axis=1) * inverse + EPSILON)
    return centred * per_row(spread, y) * per_column(scale, y) + per_column(shift, y)


class Ring(NamedTuple):
    """Tiles on their way from one warpgroup that loads to others that read, in the order of their numbers 0, 1, ...

    Attributes:
        buffer: [stages, ...] in shared memory.
        ready: barriers, one per stage: the tile has arrived.
        free: barriers, one per stage: every reader has given it back.
    """

    buffer: Any
    ready: Any
    free: Any

    @classmethod
    def scratch(cls, buffer: Any, *, stages: int, readers: int) -> Ring:
        """What `pl.run_scoped` is to allocate."""
        ready, free = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (1, readers))
        return cls(buffer, ready, free)

    @property
    def stages(self) -> int:
        """Tiles in flight."""
        return int(self.buffer.shape[0])

    def send(self, number: jax.Array, source: Any) -> None:
        """Copy a tile from global memory, as soon as its place is free."""
        slot = lax.rem(number, self.stages)

        @pl.when(number >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        plgpu.copy_gmem_to_smem(source, self.buffer.at[slot], self.ready.at[slot])

    def take(self, number: jax.Array) -> Any:
        """The tile, once it is there."""
        slot = lax.rem(number, self.stages)
        plgpu.barrier_wait(self.ready.at[slot])
        return self.buffer.at[slot]

    def give_back(self, number: jax.Array) -> None:
        """This warpgroup has read the tile."""
        plgpu.barrier_arrive(self.free.at[lax.rem(number, self.stages)])

    def drain(self, count: jax.Array) -> None:
        """Wait until the last of so many tiles have been given back."""

        @pl.loop(jnp.maximum(count - self.stages, 0), count)
        def _(number: jax.Array) -> None:
            plgpu.barrier_wait(self.free.at[lax.rem(number, self.stages)])
