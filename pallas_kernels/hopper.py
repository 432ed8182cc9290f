"""What the Mosaic GPU kernels for Hopper share."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

TILE = 64
"""Rows of a warpgroup: what one wgmma instruction takes."""

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
