"""The warpgroup that loads: tiles of two pieces, [64, 64] for each that computes, in the order of their use."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import TILE, Ring
from flame_jax.pallas_kernels.layer_stack.mosaic_form import HALVES, WIDTH, Form
from flame_jax.pallas_kernels.layer_stack.mosaic_work import PARTS, Barriers, Memory, Work, half, halves


def load(work: Work, memory: Memory, ring: Ring, barriers: Barriers, form: Form) -> None:
    """Everything for all layers."""
    if form.biased:
        for at in range(0, form.window, TILE):
            source = work.key_logs.at[work.block, :, pl.ds(work.key_start + at, TILE)]
            plgpu.copy_gmem_to_smem(source, memory.key_logs.at[at // TILE], barriers.logs_ready)

    def layer(i: jax.Array, at: jax.Array) -> jax.Array:
        _load_vectors(work, i, memory, barriers, form)
        _load_history(work, i, at, ring, form)
        return _load_matrices(work, i, at + work.tiles_per_step(form) * work.steps, ring, form)

    ring.drain(lax.fori_loop(0, work.layers, layer, jnp.int32(0)))


def _load_vectors(work: Work, i: jax.Array, memory: Memory, barriers: Barriers, form: Form) -> None:
    # The place is free: tiles of the layer before are already in use, so that the one before that is done.
    number, parity = form.first + i, lax.rem(i, 2)

    def copy(vectors: list[Any], to: int) -> None:
        for vector in vectors:
            for at in range(0, vector.shape[0], TILE):
                place = memory.vectors.at[parity, pl.ds(to + at, TILE)]
                plgpu.copy_gmem_to_smem(vector.at[pl.ds(at, TILE)], place, barriers.vectors_ready.at[parity])
            to += vector.shape[0]

    *own, following = work.vectors
    copy([work.of_layer(stack, number) for stack in own], 0)
    place, ends = sum(form.vectors[:-1]), number + 1 == form.layers

    @pl.when(jnp.logical_not(jnp.logical_and(ends, form.projects)))
    def _() -> None:
        copy([work.of_layer(following, jnp.minimum(number + 1, form.layers - 1))], place)

    if form.projects:

        @pl.when(ends)
        def _() -> None:
            copy([work.of_layer(work.after[1], 0)], place)


def _load_history(work: Work, i: jax.Array, at: jax.Array, ring: Ring, form: Form) -> None:
    """Keys, logarithms and values by turns, as soon as the layer before has written them."""
    tiles = work.tiles_per_step(form)

    def copy(keys: Any, values: Any) -> None:
        @pl.loop(0, work.steps)
        def _(step: jax.Array) -> None:
            rows, tile = pl.ds(work.key_start + step * TILE, TILE), at + tiles * step
            ring.send(tile, *halves(rows, keys))
            if form.biased:

                @pl.when(work.is_history)
                def _() -> None:
                    logs = (work.pair_logs.at[n, work.block, work.mine, half(step)] for n in range(2))
                    ring.send(tile + 1, *logs)

            ring.send(tile + tiles - 1, *halves(rows, values))

    @pl.when(i == 0)
    def _() -> None:
        copy(work.inputs[2].at[work.block], work.inputs[3].at[work.block])

    if form.count > 1:

        @pl.when(jnp.logical_and(i > 0, work.steps > 0))
        def _() -> None:
            # TMA has written, and reads after this, as in JAX's own `collective_matmul_mgpu`.
            plgpu.semaphore_wait(work.arrived, HALVES * work.tiles * i, decrement=False, memory_scope="gpu")
            keys, values = (array.at[i - 1, work.block] for array in work.between)
            copy(keys, values)


def _load_matrices(work: Work, i: jax.Array, at: jax.Array, ring: Ring, form: Form) -> jax.Array:
    """Gives the number of the tile after them."""
    number, chunks = form.first + i, form.hidden // WIDTH
    out, ffn1, ffn2 = (work.of_layer(stack, number) for stack in work.matrices[:3])
    for n in range(HALVES):
        ring.send(at + n, *halves(half(n), out))
    at += HALVES

    @pl.loop(0, chunks)
    def _(chunk: jax.Array) -> None:
        for n in range(HALVES):
            ring.send(at + 4 * chunk + n, *halves(half(n), ffn1, chunk))
        for n in range(HALVES):
            rows = (half(group, chunk) for group in range(HALVES))
            ring.send(at + 4 * chunk + HALVES + n, *(ffn2.at[own, half(n)] for own in rows))

    at += 4 * chunks

    def project(weight: Any) -> None:
        for place, part in enumerate(PARTS):
            for n in range(HALVES):
                ring.send(at + HALVES * place + n, *halves(half(n), weight, part))

    ends = number + 1 == form.layers

    @pl.when(jnp.logical_not(ends))
    def _() -> None:
        project(work.of_layer(work.matrices[3], jnp.minimum(number + 1, form.layers - 1)))

    if form.projects:

        @pl.when(ends)
        def _() -> None:
            project(work.of_layer(work.after[0], 0))

    return at + jnp.where(work.goes_on(i, form), 3 * HALVES, 0)
