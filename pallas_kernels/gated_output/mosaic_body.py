"""What one thread block of the kernel does: the last warpgroup loads, the others compute, 64 rows each."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.gated_output.mosaic_form import Barriers, Form, Memory, Operands
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
    tile_memory,
    zeros,
)
from flame_jax.pallas_kernels.items import Item


def body(number: Any, *refs: Any, form: Form) -> None:
    """The kernel; its operands are those of `mosaic._call`."""
    w, tiling = form.tiling.warpgroups, form.tiling
    operands = Operands(number[0], *refs)
    tiles = partial(tile_memory, rows=TILE, dtype=form.dtype)
    memory = Memory(
        pieces=tiles(tiling.pieces, w, width=TILE),
        weights=tiles(tiling.stages, width=tiling.columns),
        x=tiles(w, width=tiling.columns),
        gated=tiles(w, width=TILE) if form.interpret else None,
    )
    barriers = Barriers(
        piece_ready=plgpu.Barrier(num_arrivals=w, num_barriers=tiling.pieces),
        piece_free=plgpu.Barrier(num_arrivals=w, num_barriers=tiling.pieces),
        ready=plgpu.Barrier(num_barriers=tiling.stages),
        free=released(w, tiling.stages, tiling.cluster),
        x_ready=plgpu.Barrier(num_barriers=w),
        x_free=plgpu.Barrier(num_barriers=w),
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
    """Pieces and weights into whatever stage is free, turn by turn."""
    count = form.items.count()
    # So late that both rings were full since `x_free` was told: the loader does not stop for it.
    x_turn = min(max(form.tiling.stages, form.tiling.pieces), form.steps)

    @pl.loop(0, count)
    def _(n: jax.Array) -> None:
        item = form.items.at(n)

        @pl.loop(0, form.turns)
        def _(turn: jax.Array) -> None:
            later = turn - form.steps
            step = jnp.where(later < 0, turn, lax.div(later, 2))
            is_u = jnp.logical_and(later >= 0, lax.rem(later, 2) == 0)
            _send_piece(n * form.turns + turn, step, is_u, item, operands, memory, barriers, form)
            if form.whole:
                part = jnp.where(is_u, 0, jnp.where(later < 0, 1, 2))  # u, o or gated
                row = (part * form.steps + step) * TILE
                _send_weights(n * form.products + turn, row, item, operands, memory, barriers, form)
            else:

                @pl.when(jnp.logical_and(later >= 0, jnp.logical_not(is_u)))
                def _() -> None:
                    _send_weights(n * form.products + step, step * TILE, item, operands, memory, barriers, form)

            @pl.when(later == x_turn)
            def _() -> None:
                for group in range(form.tiling.warpgroups):
                    _, row = form.items.row(item, group)
                    source = operands.x.at[
                        item.block, pl.ds(row + form.first, TILE), pl.ds(item.column, form.tiling.columns)
                    ]
                    plgpu.barrier_wait(barriers.x_free.at[group])
                    plgpu.copy_gmem_to_smem(source, memory.x.at[group], barriers.x_ready.at[group])

    drain(count * form.turns, form.tiling.pieces, barriers.piece_free)
    drain(count * form.products, form.tiling.stages, barriers.free)


def _send_piece(
    at: jax.Array,
    step: jax.Array,
    is_u: jax.Array,
    item: Item,
    operands: Operands,
    memory: Memory,
    barriers: Barriers,
    form: Form,
) -> None:
    slot, columns = free_slot(at, form.tiling.pieces, barriers.piece_free), pl.ds(step * TILE, TILE)

    def send(source: Any, offset: int) -> None:
        for group in range(form.tiling.warpgroups):
            _, row = form.items.row(item, group)
            piece = source.at[item.block, pl.ds(row + offset, TILE), columns]
            plgpu.copy_gmem_to_smem(piece, memory.pieces.at[slot, group], barriers.piece_ready.at[slot])

    @pl.when(is_u)
    def _() -> None:
        send(operands.u, form.first)

    @pl.when(jnp.logical_not(is_u))
    def _() -> None:
        send(operands.o, 0)


def _send_weights(
    at: jax.Array,
    row: jax.Array,
    item: Item,
    operands: Operands,
    memory: Memory,
    barriers: Barriers,
    form: Form,
) -> None:
    slot = free_slot(at, form.tiling.stages, barriers.free)
    source = operands.weights.at[operands.layer, pl.ds(row, TILE), pl.ds(item.column, form.tiling.columns)]
    copy_to_cluster(source, memory.weights.at[slot], barriers.ready.at[slot], form.tiling.cluster, form.interpret)


def _compute(operands: Operands, group: jax.Array, memory: Memory, barriers: Barriers, form: Form) -> None:
    """One warpgroup's 64 rows of every item."""
    count = form.items.count()

    @pl.loop(0, count)
    def _(n: jax.Array) -> None:
        item = form.items.at(n)
        inside, row = form.items.row(item, group)
        y = pl.run_scoped(
            partial(_product, operands, group, n, memory, barriers, form),
            plgpu.ACC((TILE, form.tiling.columns), jnp.float32),
        )
        plgpu.barrier_wait(barriers.x_ready.at[group])
        residual = plgpu.load(memory.x.at[group], layout=FULL).astype(jnp.float32)
        memory.x[group] = (y + residual).astype(form.dtype)
        plgpu.commit_smem()

        @pl.when(inside)
        def _() -> None:
            to = operands.out.at[item.block, pl.ds(row, TILE), pl.ds(item.column, form.tiling.columns)]
            plgpu.copy_smem_to_gmem(memory.x.at[group], to)

    plgpu.wait_smem_to_gmem(0)


def _product(
    operands: Operands,
    group: jax.Array,
    n: jax.Array,
    memory: Memory,
    barriers: Barriers,
    form: Form,
    accumulator: Any,
) -> jax.Array:
    """float32[64, columns] of the group's rows."""
    piece_turn, turn = n * form.turns, n * form.products

    def take(at: jax.Array) -> Any:
        slot = lax.rem(at, form.tiling.pieces)
        plgpu.barrier_wait(barriers.piece_ready.at[slot])
        return memory.pieces.at[slot, group]

    def release(at: jax.Array) -> None:
        plgpu.barrier_arrive(barriers.piece_free.at[lax.rem(at, form.tiling.pieces)])

    def multiply(piece: Any, at: jax.Array) -> None:
        """Start product number `at`."""
        slot = lax.rem(turn + at, form.tiling.stages)
        plgpu.barrier_wait(barriers.ready.at[slot])
        plgpu.wgmma(accumulator, piece, memory.weights.at[slot])

    def finish(at: jax.Array) -> None:
        """Wait until `at` is the only product under way; the weights of the one before it may go."""
        plgpu.wgmma_wait(1)

        @pl.when(at > 0)
        def _() -> None:
            plgpu.barrier_arrive(barriers.free.at[lax.rem(turn + at - 1, form.tiling.stages)])

    def see(step: jax.Array, moments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """A piece of o: its product, and the mean and the squares so far with it."""
        piece = take(piece_turn + step)
        if form.whole:
            multiply(piece, step)
        moments = add_moments(plgpu.load(piece, layout=FULL).astype(jnp.float32), step, moments)
        if form.whole:
            finish(step)

            @pl.when(step > 0)
            def _() -> None:
                release(piece_turn + step - 1)
        else:
            release(piece_turn + step)
        return moments

    mean, squares = lax.fori_loop(0, form.steps, see, (zeros(TILE, layout=ROW), zeros(TILE, layout=ROW)))
    spread = lax.rsqrt(squares * (1.0 / form.values) + form.epsilon)
    # Once the item before has left, the loader may bring x.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(barriers.x_free.at[group])

    @pl.loop(0, form.steps)
    def _(step: jax.Array) -> None:
        at = form.steps + 2 * step
        u = take(piece_turn + at)
        if form.whole:
            multiply(u, at)
            finish(at)
            release(piece_turn + at - 1)
        else:
            plgpu.wgmma_wait(0)  # the last gated piece is read from registers that the next one gets
        o = take(piece_turn + at + 1)
        gated = _gate(operands, u, o, step, mean, spread, form)
        if form.interpret:  # `wgmma` takes both operands from shared memory only
            memory.gated[group] = gated
            plgpu.commit_smem()
            gated = memory.gated.at[group]
        product = at + 1 if form.whole else step
        multiply(gated, product)
        finish(product)
        release(piece_turn + at)
        if not form.whole:
            release(piece_turn + at + 1)

    y = accumulator[...]
    plgpu.barrier_arrive(barriers.free.at[lax.rem(turn + form.products - 1, form.tiling.stages)])
    if form.whole:
        release(piece_turn + form.turns - 1)
    return y


def _gate(
    operands: Operands, u: Any, o: Any, step: jax.Array, mean: jax.Array, spread: jax.Array, form: Form
) -> jax.Array:
    """u times the norm of o, for 64 columns."""
    centred = plgpu.load(o, layout=FULL).astype(jnp.float32)
    centred = centred - per_row(mean, centred)
    columns = pl.ds(step * TILE, TILE)
    scale, shift = (
        per_column(plgpu.load(ref.at[operands.layer, columns], layout=COLUMN, optimized=False), centred)
        for ref in (operands.scale, operands.shift)
    )
    normed = (centred * per_row(spread, centred) * scale + shift).astype(form.dtype)
    return plgpu.load(u, layout=FULL) * normed
