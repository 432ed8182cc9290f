"""What one thread block of the Mosaic GPU kernel does: tiles of one block's rows, one after another.

The last warpgroup loads weights, chunk by chunk, some chunks ahead; the others compute, 64 rows of a tile each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import (
    COLUMN,
    FULL,
    TILE,
    Ring,
    by_role,
    norm_rows,
    per_column,
    tile_memory,
)
from flame_jax.pallas_kernels.post_attention.mosaic_form import Form
from flame_jax.pallas_kernels.post_attention.types import IN_MEMORY, VECTORS


class _Work(NamedTuple):
    """Operands in global memory, of this thread block's block and layer; shared memory; barriers."""

    attended: Any  # [rows, inner]
    x: Any  # [rows, d]
    out_w: Any  # [inner, d]
    ffn1_w: Any  # [d, ffn]
    ffn2_w: Any  # [ffn, d]
    vectors: list[Any]  # [d or ffn] each; [3 * inner], where there is a following layer
    next_w: Any  # [d, 3 * inner]
    outputs: list[Any]  # [rows - first, d], [rows - first, inner], and two of [rows, inner]
    staging: Any  # [warpgroups, inner / chunk, 64, chunk]: attended, then pieces of q, k and v
    rows: Any  # [warpgroups, 64, d]: x, then what the first norm gives, then the second
    vector: Any  # [all the vectors]
    columns_ring: Ring  # of columns of ffn1_w and next_w, [d, chunk]
    rows_ring: Ring  # of rows of out_w and ffn2_w, [chunk, d]
    own_ready: Any
    vectors_ready: Any


def body(*refs: Any, form: Form) -> None:
    """The kernel; its operands are those of `mosaic._call`."""
    w, s, chunk = form.tiling.warpgroups, form.tiling.stages, form.tiling.chunk
    tiles = partial(tile_memory, dtype=form.dtype)
    scratch = {
        "staging": tiles(w, form.attended_chunks, rows=TILE, width=chunk),
        "rows": tiles(w, rows=TILE, width=form.width),
        "vector": plgpu.SMEM((sum(form.vectors),), jnp.float32),
        "columns_ring": Ring.scratch(tiles(s, rows=form.width, width=chunk), stages=s, readers=w),
        "rows_ring": Ring.scratch(tiles(s, rows=chunk, width=form.width), stages=s, readers=w),
        "own_ready": plgpu.Barrier(num_arrivals=1 + form.attended_chunks, num_barriers=w),
        "vectors_ready": plgpu.Barrier(num_arrivals=sum(form.vectors) // TILE),
    }

    def work_off(**memory: Any) -> None:
        work, worker, workers = _work(refs, memory, form), lax.axis_index("worker"), lax.axis_size("worker")
        tiles = lax.div(form.tiles - 1 - worker, workers) + 1

        def compute(group: jax.Array) -> None:
            plgpu.barrier_wait(work.vectors_ready)

            @pl.loop(0, tiles)
            def _(number: jax.Array) -> None:
                _compute(work, number, ((worker + number * workers) * w + group) * TILE, group, form)

            plgpu.wait_smem_to_gmem(0)  # shared memory must not go before what is stored from it

        by_role(w, form.interpret, lambda: _load(work, tiles, form), compute)

    pl.run_scoped(work_off, collective_axes="warpgroup", **scratch)


def _work(refs: tuple[Any, ...], memory: dict[str, Any], form: Form) -> _Work:
    number, attended, x, out_w, ffn1_w, ffn2_w, *rest = refs
    block, layer = lax.axis_index("block"), number[0]

    def own(weight: Any, layer: jax.Array = layer) -> Any:
        return weight.at[layer, jnp.minimum(block, weight.shape[1] - 1)]

    vectors, next_w = [own(rest.pop(0)) for _ in VECTORS], None
    if form.projects:
        following = rest.pop(0)[0]
        vectors.append(own(rest.pop(0), following))
        next_w = own(rest.pop(0), following)
    return _Work(
        attended=attended.at[block],
        x=x.at[block],
        out_w=own(out_w),
        ffn1_w=own(ffn1_w),
        ffn2_w=own(ffn2_w),
        vectors=vectors,
        next_w=next_w,
        outputs=[output.at[block] for output in rest],
        **memory,
    )


def _load(work: _Work, tiles: jax.Array, form: Form) -> None:
    """Vectors once, and for every tile all weights."""
    chunk = form.tiling.chunk
    pieces = [vector.at[pl.ds(at, TILE)] for vector in work.vectors for at in range(0, vector.shape[0], TILE)]
    for n, piece in enumerate(pieces):
        plgpu.copy_gmem_to_smem(piece, work.vector.at[pl.ds(n * TILE, TILE)], work.vectors_ready)

    @pl.loop(0, tiles)
    def _(number: jax.Array) -> None:
        column, row = _first_chunks(number, form)
        for n in range(form.attended_chunks):
            work.rows_ring.send(row + n, work.out_w.at[pl.ds(n * chunk, chunk)])

        @pl.loop(0, form.hidden_chunks)
        def _(n: jax.Array) -> None:
            work.columns_ring.send(column + n, work.ffn1_w.at[:, pl.ds(n * chunk, chunk)])
            work.rows_ring.send(row + form.attended_chunks + n, work.ffn2_w.at[pl.ds(n * chunk, chunk)])

        if form.projects:

            @pl.loop(0, form.mixed_chunks)
            def _(n: jax.Array) -> None:
                work.columns_ring.send(column + form.hidden_chunks + n, work.next_w.at[:, pl.ds(n * chunk, chunk)])

    column, row = _first_chunks(tiles, form)
    work.columns_ring.drain(column)
    work.rows_ring.drain(row)


def _first_chunks(tile: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
    """Numbers of a tile's first chunks in the rings of columns and of rows."""
    return tile * (form.hidden_chunks + form.mixed_chunks), tile * (form.attended_chunks + form.hidden_chunks)


def _compute(work: _Work, number: jax.Array, wanted: jax.Array, group: jax.Array, form: Form) -> None:
    """One warpgroup's 64 rows of a tile; rows beyond the end are the last ones once more, and are not stored."""
    column, row = _first_chunks(number, form)
    start = pl.multiple_of(jnp.minimum(wanted, form.rows - TILE), TILE)
    mine, inside = pl.ds(start, TILE), wanted < form.rows
    # Of the output and q.
    kept, after_first = pl.ds(start - form.first, TILE), jnp.logical_and(inside, wanted >= form.first)
    staging, x = work.staging.at[group], work.rows.at[group]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last tile left there
    for n in range(form.attended_chunks):
        source = work.attended.at[mine, pl.ds(n * form.tiling.chunk, form.tiling.chunk)]
        plgpu.copy_gmem_to_smem(source, staging.at[n], work.own_ready.at[group])
    plgpu.copy_gmem_to_smem(work.x.at[mine], x, work.own_ready.at[group])
    plgpu.barrier_wait(work.own_ready.at[group])

    vector = partial(_vector, work, form)
    y = _project_out(work, row, staging, form)
    _add_and_norm(x, y, vector("out_b"), vector("norm1_scale"), vector("norm1_shift"), form)
    y = _ffn(work, column, row + form.attended_chunks, x, staging, form)
    _add_and_norm(x, y, vector("ffn2_b"), vector("norm2_scale"), vector("norm2_shift"), form)

    @pl.when(after_first)
    def _() -> None:
        plgpu.copy_smem_to_gmem(x, work.outputs[0].at[kept])

    if form.projects:
        places = [(after_first, kept), (inside, mine), (inside, mine)]
        _project_next(work, column + form.hidden_chunks, x, staging, places, form)


def _vector(work: _Work, form: Form, name: str, at: Any = 0, size: int | None = None) -> jax.Array:
    """One of the vectors, or a piece of it, as an accumulator's columns."""
    index = IN_MEMORY.index(name)
    start = sum(form.vectors[:index]) + at
    return plgpu.load(work.vector.at[pl.ds(start, size or form.vectors[index])], layout=COLUMN)


def _while_multiplying(a: Any, b: Any, do: Callable[[], Any]) -> tuple[jax.Array, Any]:
    """a @ b, and what `do` gives, which is done while the tensor cores work.

    Another product that `do` starts must have its operands by then: ptxas makes all products wait for one another
    where registers that one of them reads are written while another is under way.
    """

    def scope(accumulator: Any) -> tuple[jax.Array, Any]:
        plgpu.wgmma(accumulator, a, b)
        done = do()
        return accumulator[...], done

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _project_out(work: _Work, row: jax.Array, staging: Any, form: Form) -> jax.Array:
    def scope(accumulator: Any) -> jax.Array:
        for n in range(form.attended_chunks):
            plgpu.wgmma(accumulator, staging.at[n], work.rows_ring.take(row + n))
        return accumulator[...]

    y = pl.run_scoped(scope, plgpu.ACC((TILE, form.width), jnp.float32))
    for n in range(form.attended_chunks):
        work.rows_ring.give_back(row + n)
    return y


def _add_and_norm(x: Any, y: jax.Array, bias: jax.Array, scale: jax.Array, shift: jax.Array, form: Form) -> None:
    """x = norm(x + y + bias), in shared memory."""
    y = y + per_column(bias, y) + plgpu.load(x, layout=FULL).astype(jnp.float32)
    x[...] = norm_rows(y, scale, shift).astype(form.dtype)
    plgpu.commit_smem()


def _ffn(work: _Work, column: jax.Array, row: jax.Array, x: Any, staging: Any, form: Form) -> jax.Array:
    """The hidden layer is never stored. While a chunk of it is rectified, the next one is being computed, and the
    last one multiplied on."""
    chunk, last = form.tiling.chunk, form.hidden_chunks - 1

    def rectified(raw: jax.Array, n: Any) -> jax.Array:
        bias = _vector(work, form, "ffn1_b", n * chunk, chunk)
        return jnp.maximum(raw + per_column(bias, raw), 0.0).astype(form.dtype)

    def add(accumulator: Any, hidden: jax.Array, n: Any) -> None:
        if form.interpret:  # it takes both operands from shared memory only
            staging[0] = hidden
            plgpu.commit_smem()
            hidden = staging.at[0]
        plgpu.wgmma(accumulator, hidden, work.rows_ring.take(row + n))

    def up(n: Any, do: Callable[[], Any]) -> tuple[jax.Array, Any]:
        result = _while_multiplying(x, work.columns_ring.take(column + n), do)
        work.columns_ring.give_back(column + n)
        return result

    def scope(accumulator: Any) -> jax.Array:
        def step(n: jax.Array, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            raw, hidden = before

            def add_and_rectify() -> jax.Array:
                add(accumulator, hidden, n - 1)
                return rectified(raw, n)

            result = up(n + 1, add_and_rectify)
            work.rows_ring.give_back(row + n - 1)
            return result

        raw, _ = up(0, lambda: None)
        if last:
            raw, hidden = lax.fori_loop(1, last, step, up(1, partial(rectified, raw, 0)))
            add(accumulator, hidden, last - 1)
        hidden = rectified(raw, last)
        plgpu.wgmma_wait(0)
        add(accumulator, hidden, last)
        return accumulator[...]

    y = pl.run_scoped(scope, plgpu.ACC((TILE, form.width), jnp.float32))
    for n in range(max(last - 1, 0), last + 1):
        work.rows_ring.give_back(row + n)
    return y


def _project_next(
    work: _Work, column: jax.Array, x: Any, staging: Any, places: list[tuple[jax.Array, Any]], form: Form
) -> None:
    """q, k and v of the following layer; while a chunk is stored, the next one is being computed.

    Args:
        places: of q, k and v: whether these rows are stored, and where.
    """
    chunk, slots, last = form.tiling.chunk, form.attended_chunks, form.mixed_chunks - 1

    def store(raw: jax.Array, n: Any) -> None:
        which, slot = lax.div(n, slots), lax.rem(n, slots)
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # the piece that lay there has left
        staging[slot] = (raw + per_column(_vector(work, form, "next_b", n * chunk, chunk), raw)).astype(form.dtype)
        plgpu.commit_smem()
        for i, (output, (stored, rows)) in enumerate(zip(work.outputs[1:], places, strict=True)):

            @pl.when(jnp.logical_and(stored, which == i))
            def _(output: Any = output, rows: Any = rows) -> None:
                plgpu.copy_smem_to_gmem(staging.at[slot], output.at[rows, pl.ds(slot * chunk, chunk)])

    def project(n: Any, do: Callable[[], Any]) -> jax.Array:
        mixed, _ = _while_multiplying(x, work.columns_ring.take(column + n), do)
        work.columns_ring.give_back(column + n)
        return mixed

    raw = project(0, lambda: None)
    raw = lax.fori_loop(0, last, lambda n, raw: project(n + 1, partial(store, raw, n)), raw)
    store(raw, jnp.int32(last))
