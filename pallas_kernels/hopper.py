"""What the Mosaic GPU kernels for Hopper share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.rows import EPSILON

TILE = 64
"""Rows of a warpgroup: what one wgmma instruction takes."""

FULL, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Where a warpgroup's threads hold an accumulator, one number per row of it, and one per column."""

MULTIPROCESSORS = 132
"""Of an H100 or H200: thread blocks that are started where each works off a list. Another number is right, too."""

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


def by_role(warpgroups: int, interpret: bool, load: Callable[[], None], compute: Callable[[jax.Array], None]) -> None:
    """The last warpgroup loads, with few registers; so many others compute, each told its number."""
    group = lax.axis_index("warpgroup")
    many, few = _REGISTERS[warpgroups]

    @pl.when(group == warpgroups)
    def _() -> None:
        if not interpret:
            plgpu.set_max_registers(few, action="decrease")
        load()

    @pl.when(group < warpgroups)
    def _() -> None:
        if not interpret:
            plgpu.set_max_registers(many, action="increase")
        compute(group)


def kernel(body: Callable[..., None], form: Any, out_type: Any, *, grid: Mapping[str, int], cluster: int = 0) -> Any:
    """`body` as a function of arrays, for thread blocks of `form.tiling.warpgroups` that compute and one that loads.

    Args:
        body: called with all operands and outputs in global memory, and `form`.
        grid: thread blocks, or clusters of them, by axis name.
        cluster: thread blocks of a cluster, its axis being "cluster"; 0 for no such axis.
    """
    shared = {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster else {}
    return plgpu.kernel(
        partial(body, form=form),
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=form.tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(form.interpret),
        **shared,
    )


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


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    half = x * 0.5
    return half + half * jnp.tanh(half)  # one special function instead of two


def zeros(*shape: int, layout: Any) -> jax.Array:
    """float32 zeros where a warpgroup's threads hold them."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def released(arrivals: int, number: int, cluster: int) -> Any:
    """Barriers that tell the loaders of a whole cluster that its warpgroups, `arrivals` a thread block, are through."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=arrivals, num_barriers=number)


def copy_to_cluster(source: Any, to: Any, ready: Any, cluster: int, interpret: bool) -> None:
    """Global memory to the shared memory of every thread block of a cluster, all of which call this with one source."""
    # In the interpreter every block copies for itself.
    shared = {} if interpret or cluster == 1 else {"collective_axes": "cluster"}
    plgpu.copy_gmem_to_smem(source, to, ready, **shared)


def free_slot(at: jax.Array, stages: int, free: Any) -> jax.Array:
    """For the tile number `at` of a ring: its slot, once what lay there was used."""
    slot = lax.rem(at, stages)

    @pl.when(at >= stages)
    def _() -> None:
        plgpu.barrier_wait(free.at[slot])

    return slot


def drain(tiles: jax.Array, stages: int, free: Any) -> None:
    """Wait until the last of so many tiles of a ring are used."""

    @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
    def _(at: jax.Array) -> None:
        plgpu.barrier_wait(free.at[lax.rem(at, stages)])


def add_moments(piece: jax.Array, before: jax.Array, seen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Of every row, over `before` pieces and one more (Chan's rule): mean, and sum of squared distances from it.

    Args:
        piece: float32[64, 64].
        seen: the same, over the pieces before: float32[64] each, held as `ROW`.
    """
    mean, squares = seen
    count = before.astype(jnp.float32)
    weight = 1.0 / (count + 1.0)
    own = piece.sum(axis=1) * (1.0 / TILE)
    centred = piece - per_row(own, piece)
    apart = own - mean
    squares = squares + (centred * centred).sum(axis=1) + apart * apart * (count * weight * TILE)
    return mean + apart * weight, squares


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
    def scratch(cls, buffer: Any, *, stages: int, readers: int, pieces: int = 1) -> Ring:
        """What `pl.run_scoped` is to allocate; a tile arrives in so many pieces."""
        ready, free = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (pieces, readers))
        return cls(buffer, ready, free)

    @property
    def stages(self) -> int:
        """Tiles in flight."""
        return int(self.buffer.shape[0])

    def send(self, number: jax.Array, *pieces: Any) -> None:
        """Copy a tile from global memory, as soon as its place is free; of several pieces each to its own part."""
        slot = free_slot(number, self.stages, self.free)
        parts = [self.buffer.at[slot]] if len(pieces) == 1 else [self.buffer.at[slot, n] for n in range(len(pieces))]
        for piece, part in zip(pieces, parts, strict=True):
            plgpu.copy_gmem_to_smem(piece, part, self.ready.at[slot])

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
        drain(count, self.stages, self.free)
