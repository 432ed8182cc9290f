"""What one thread block of the kernel does: the last warpgroup loads, the others compute, 64 rows each."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import (
    COLUMN,
    FULL,
    ROW,
    TILE,
    add_moments,
    by_role,
    copy_to_cluster,
    drain,
    free_slot,
    per_column,
    per_row,
    released,
    silu,
    tile_memory,
    zeros,
)
from flame_jax.pallas_kernels.pre_attention.mosaic_form import Barriers, Form, Memory, Operands


def body(number: Any, scale: Any, shift: Any, bias: Any, x: Any, weights: Any, *outputs: Any, form: Form) -> None:
    """The kernel; its operands are those of `mosaic._call`."""
    w, tiling = form.tiling.warpgroups, form.tiling
    operands = Operands(number[0], scale, shift, bias, x, weights, outputs)
    tiles = partial(tile_memory, rows=TILE, dtype=form.dtype)
    memory = Memory(
        pieces=tiles(tiling.pieces, w, width=TILE),
        weights=tiles(tiling.stages, width=tiling.chunk),
        out=tiles(w, width=tiling.chunk),
        rows=tiles(w, form.steps, width=TILE) if form.interpret else None,
    )
    barriers = Barriers(
        piece_ready=plgpu.Barrier(num_arrivals=w, num_barriers=tiling.pieces),
        piece_free=plgpu.Barrier(num_arrivals=w, num_barriers=tiling.pieces),
        ready=plgpu.Barrier(num_barriers=tiling.stages),
        free=released(w, tiling.stages, tiling.cluster),
    )

    def work_off(memory: Memory, barriers: Barriers) -> None:
        by_role(
            w,
            form.interpret,
            lambda: _load(operands, memory, barriers, form),
            lambda group: _compute(operands, group, memory, barriers, form),
        )

    pl.run_scoped(work_off, memory, barriers, collective_axes="warpgroup")


def _load(operands: Operands, memory: Memory, barriers: Barriers, form: Form) -> None:
    """Pieces of x, twice, then weights, into whatever stage is free."""
    tiling, steps, turns = form.tiling, form.steps, form.steps * form.chunks
    count = form.items.count()

    @pl.loop(0, count)
    def _(n: jax.Array) -> None:
        item = form.items.at(n)

        @pl.loop(0, 2 * steps)
        def _(turn: jax.Array) -> None:
            slot = free_slot(2 * n * steps + turn, tiling.pieces, barriers.piece_free)
            for group in range(tiling.warpgroups):
                _, row = form.items.row(item, group)
                source = operands.x.at[item.block, pl.ds(row, TILE), pl.ds(lax.rem(turn, steps) * TILE, TILE)]
                plgpu.copy_gmem_to_smem(source, memory.pieces.at[slot, group], barriers.piece_ready.at[slot])

        @pl.loop(0, turns)
        def _(turn: jax.Array) -> None:
            slot = free_slot(n * turns + turn, tiling.stages, barriers.free)
            rows = pl.ds(lax.rem(turn, steps) * TILE, TILE)
            columns = pl.ds(item.column + lax.div(turn, steps) * tiling.chunk, tiling.chunk)
            source = operands.weights.at[operands.layer, rows, columns]
            ready = barriers.ready.at[slot]
            copy_to_cluster(source, memory.weights.at[slot], ready, tiling.cluster, form.interpret)

    drain(2 * count * steps, tiling.pieces, barriers.piece_free)
    drain(count * turns, tiling.stages, barriers.free)


def _compute(operands: Operands, group: jax.Array, memory: Memory, barriers: Barriers, form: Form) -> None:
    """One warpgroup's 64 rows of every item."""
    count = form.items.count()

    @pl.loop(0, count)
    def _(n: jax.Array) -> None:
        item = form.items.at(n)
        inside, start = form.items.row(item, group)
        rows = _normed(operands, n, group, memory, barriers, form)
        if form.interpret:  # its `wgmma` takes both operands from shared memory only
            for step, row in enumerate(rows):
                memory.rows[group, step] = row
            plgpu.commit_smem()
            rows = [memory.rows.at[group, step] for step in range(form.steps)]

        @pl.loop(0, form.chunks)
        def _(chunk: jax.Array) -> None:
            turn = (n * form.chunks + chunk) * form.steps
            y = pl.run_scoped(
                partial(_product, rows, turn, memory, barriers, form),
                plgpu.ACC((TILE, form.tiling.chunk), jnp.float32),
            )
            column = item.column + chunk * form.tiling.chunk
            y = _activated(operands, y, column, form)
            # Once what lay there has left.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory.out[group] = y.astype(form.dtype)
            plgpu.commit_smem()

            @pl.when(inside)
            def _() -> None:
                _store(memory.out.at[group], operands.outputs, item.block, pl.ds(start, TILE), column, form)

    plgpu.wait_smem_to_gmem(0)


def _normed(
    operands: Operands, n: jax.Array, group: jax.Array, memory: Memory, barriers: Barriers, form: Form
) -> list[Any]:
    """LayerNorm of item n's rows, in registers: their pieces of 64 columns as `wgmma` takes them.

    They come by twice: there are no registers for all of them in float32, nor shared memory.
    """

    def piece(at: Any) -> jax.Array:
        turn = 2 * n * form.steps + at
        slot = lax.rem(turn, form.tiling.pieces)
        plgpu.barrier_wait(barriers.piece_ready.at[slot])
        x = plgpu.load(memory.pieces.at[slot, group], layout=FULL)
        plgpu.barrier_arrive(barriers.piece_free.at[slot])
        return x.astype(jnp.float32)

    none = zeros(TILE, layout=ROW), zeros(TILE, layout=ROW)
    mean, squares = lax.fori_loop(0, form.steps, lambda step, seen: add_moments(piece(step), step, seen), none)
    spread = lax.rsqrt(squares * (1.0 / form.width) + form.epsilon)
    rows = []
    for step in range(form.steps):
        columns, x = pl.ds(step * TILE, TILE), piece(form.steps + step)
        scale, shift = (
            per_column(plgpu.load(ref.at[operands.layer, columns], layout=COLUMN, optimized=False), x)
            for ref in (operands.scale, operands.shift)
        )
        rows.append(((x - per_row(mean, x)) * per_row(spread, x) * scale + shift).astype(form.dtype))
    return rows


def _activated(operands: Operands, y: jax.Array, column: jax.Array, form: Form) -> jax.Array:
    """Bias, and SiLU where it belongs, of the columns from `column` on."""
    columns = pl.ds(column, form.tiling.chunk)
    y = y + per_column(plgpu.load(operands.bias.at[operands.layer, columns], layout=COLUMN, optimized=False), y)
    if form.activated == sum(form.sizes):
        return silu(y)
    return lax.cond(column < form.activated, silu, lambda y: y, y)


def _product(
    rows: list[Any], turn: jax.Array, memory: Memory, barriers: Barriers, form: Form, accumulator: Any
) -> jax.Array:
    """The rows times one chunk of columns, float32[64, chunk]."""
    slots = [lax.rem(turn + step, form.tiling.stages) for step in range(form.steps)]
    for step, slot in enumerate(slots):
        plgpu.barrier_wait(barriers.ready.at[slot])
        plgpu.wgmma(accumulator, rows[step], memory.weights.at[slot])
        if step:
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(barriers.free.at[slots[step - 1]])
    y = accumulator[...]
    plgpu.barrier_arrive(barriers.free.at[slots[-1]])
    return y


def _store(y: Any, outputs: tuple[Any, ...], block: jax.Array, rows: Any, column: jax.Array, form: Form) -> None:
    """To whichever of u, v, q and k the columns belong to."""
    start = 0
    for output, size in zip(outputs, form.sizes, strict=True):

        @pl.when(jnp.logical_and(column >= start, column < start + size))
        def _(output: Any = output, start: int = start) -> None:
            plgpu.copy_smem_to_gmem(y, output.at[block, rows, pl.ds(column - start, form.tiling.chunk)])

        start += size
