"""The row-wise rest of a post-norm transformer layer as one Mosaic GPU kernel (Hopper); docs/kernels.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels import tuned
from flame_jax.pallas_kernels.hopper import (
    COLUMN,
    FULL,
    TILE,
    few_registers,
    interpreter,
    many_registers,
    per_column,
    per_row,
    tile_memory,
)
from flame_jax.pallas_kernels.post_attention.types import LayerWeights, layer_weights
from flame_jax.pallas_kernels.rows import EPSILON


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        warpgroups: that compute, 64 rows each.
        chunk: columns of the hidden layer, and of the next layer's q, k and v, at once.
        stages: chunks of weights in flight, of either kind.
    """

    warpgroups: int = 2
    chunk: int = 64
    stages: int = 3


@dataclass(frozen=True)
class Form:
    """Everything static about one kernel."""

    width: int
    inner: int
    hidden: int
    rows: int
    mixed: int
    dtype: Any
    tiling: Tiling
    interpret: bool

    @property
    def vectors(self) -> tuple[int, ...]:
        """Lengths of out_b, norm1_scale, norm1_shift, ffn1_b, ffn2_b, norm2_scale, norm2_shift and the next qkv_b."""
        d = self.width
        return d, d, d, self.hidden, d, d, d, self.mixed


def post_attention(
    attended: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    *,
    project: bool,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `api.post_attention`.

    Args:
        project: whether there is a next layer.

    Raises:
        ValueError: `misfit` has something against it.
    """
    rows, width = x.shape[1:]
    reason = misfit(x.dtype, width, attended.shape[-1], weights["ffn1_w"].shape[-1], rows)
    if reason:
        raise ValueError(f"post-attention on Mosaic GPU: {reason}")
    stack = layer_weights(weights, x.dtype)
    mixed = stack.qkv_w.shape[-1] if project else 0
    hidden = stack.ffn1_w.shape[-1]
    tiling = tiling or tiling_for({"width": width, "inner": attended.shape[-1], "hidden": hidden}, x.shape[0] * rows)
    form = Form(width, attended.shape[-1], hidden, rows, mixed, x.dtype, tiling, interpret)
    return _call(attended, x, stack, jnp.full((1,), layer, jnp.int32), form)


def tiling_for(shape: Mapping[str, Any], rows: int) -> Tiling:
    """The measured one, or else one that fits the registers and the shared memory."""
    found = tuned.best("post_attention", shape, rows)
    return Tiling(**found) if found else Tiling()


def misfit(dtype: Any, width: int, inner: int, hidden: int, rows: int) -> str:
    """Why the kernel can't do this; empty where it can.

    Args:
        rows: token rows, or what they are a multiple of.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float16"
    if width not in (64, 128):
        return f"the width is {width}, not 64 or 128"
    if inner not in (64, 128) or hidden % TILE:
        return f"the heads have {inner} dimensions together, not 64 or 128, or the FFN's {hidden} are no multiple of 64"
    return f"{rows} rows are no multiple of {TILE}" if rows % TILE else ""


# Layers differ in an operand only, so that a stack of them is lowered once.
@partial(jax.jit, static_argnames="form")
def _call(
    attended: jax.Array, x: jax.Array, weights: LayerWeights, layer: jax.Array, form: Form
) -> tuple[jax.Array, ...]:
    blocks, rows, _ = x.shape
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if form.mixed:
        shapes += [jax.ShapeDtypeStruct((blocks, rows, form.mixed // 3), x.dtype)] * 3
    call = plgpu.kernel(
        partial(_kernel, form=form),
        out_type=shapes,
        grid=(-(-rows // (TILE * form.tiling.warpgroups)), blocks),
        grid_names=("tile", "block"),
        num_threads=form.tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(form.interpret),
    )
    matrices = [weights.out_w, weights.ffn1_w, weights.ffn2_w] + ([weights.qkv_w] if form.mixed else [])
    return tuple(call(layer, weights.vectors, attended, x, *matrices))


def _kernel(*refs: Any, form: Form) -> None:
    w, s, chunk = form.tiling.warpgroups, form.tiling.stages, form.tiling.chunk
    tiles = partial(tile_memory, dtype=form.dtype)

    scratch = [
        tiles(
            w, form.inner // chunk, rows=TILE, width=chunk
        ),  # attended, then pieces of q, k and v; of the hidden layer in the interpreter
        tiles(w, rows=TILE, width=form.width),  # x, then what the first norm gives
        tiles(s, rows=form.width, width=chunk),  # columns of ffn1_w and qkv_w
        tiles(s, rows=chunk, width=form.width),  # rows of out_w and ffn2_w
        plgpu.SMEM((sum(form.vectors),), jnp.float32),
    ]
    barriers = [
        plgpu.Barrier(num_arrivals=1 + form.inner // chunk, num_barriers=w),
        plgpu.Barrier(num_arrivals=sum(form.vectors) // TILE),
        plgpu.Barrier(num_arrivals=1, num_barriers=s),
        plgpu.Barrier(num_arrivals=1, num_barriers=s),
        plgpu.Barrier(num_arrivals=w, num_barriers=s),
        plgpu.Barrier(num_arrivals=w, num_barriers=s),
    ]
    pl.run_scoped(lambda *scoped: _tile(refs, scoped, form), scratch, *barriers, collective_axes="warpgroup")


def _tile(refs: Sequence[Any], scoped: tuple[Any, ...], form: Form) -> None:
    tiling, (chunk, stages) = form.tiling, (form.tiling.chunk, form.tiling.stages)
    number, vectors, attended, x, out_w, ffn1_w, ffn2_w, *rest = refs
    qkv_w: Any = rest.pop(0) if form.mixed else None
    outputs = rest
    (o_smem, x_smem, columns, rows, vector), *barriers = scoped
    own_ready, vectors_ready, columns_ready, rows_ready, columns_free, rows_free = barriers
    layer, block, group = number[0], lax.axis_index("block"), lax.axis_index("warpgroup")

    @pl.when(group == tiling.warpgroups)
    def _load() -> None:
        few_registers(tiling.warpgroups, form.interpret)
        for at in range(0, sum(form.vectors), TILE):
            part = pl.ds(at, TILE)
            plgpu.copy_gmem_to_smem(vectors.at[layer, block, part], vector.at[part], vectors_ready)
        counts = [0, 0]

        def send(kind: int, source: Any) -> None:
            buffer, ready, free = ((columns, columns_ready, columns_free), (rows, rows_ready, rows_free))[kind]
            slot, counts[kind] = counts[kind] % stages, counts[kind] + 1
            if counts[kind] > stages:
                plgpu.barrier_wait(free.at[slot])
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])

        for at in range(0, form.inner, chunk):
            send(1, out_w.at[layer, block, pl.ds(at, chunk)])
        for at in range(0, form.hidden, chunk):
            send(0, ffn1_w.at[layer, block, :, pl.ds(at, chunk)])
            send(1, ffn2_w.at[layer, block, pl.ds(at, chunk)])
        for at in range(0, form.mixed, chunk):
            send(0, qkv_w.at[layer + 1, block, :, pl.ds(at, chunk)])
        for count, free in zip(counts, (columns_free, rows_free), strict=True):
            for n in range(max(count - stages, 0), count):
                plgpu.barrier_wait(free.at[n % stages])

    @pl.when(group < tiling.warpgroups)
    def _compute() -> None:
        many_registers(tiling.warpgroups, form.interpret)
        wanted = (lax.axis_index("tile") * tiling.warpgroups + group) * TILE
        inside = wanted < form.rows
        mine = pl.ds(pl.multiple_of(jnp.minimum(wanted, form.rows - TILE), TILE), TILE)
        for n in range(form.inner // chunk):
            source = attended.at[block, mine, pl.ds(n * chunk, chunk)]
            plgpu.copy_gmem_to_smem(source, o_smem.at[group, n], own_ready.at[group])
        plgpu.copy_gmem_to_smem(x.at[block, mine], x_smem.at[group], own_ready.at[group])
        plgpu.barrier_wait(vectors_ready)
        plgpu.barrier_wait(own_ready.at[group])
        starts = [sum(form.vectors[:i]) for i in range(len(form.vectors))]

        def piece(index: int, at: int = 0, size: int | None = None) -> jax.Array:
            size = form.vectors[index] if size is None else size
            return plgpu.load(vector.at[pl.ds(starts[index] + at, size)], layout=COLUMN)

        counts = [0, 0]

        def take(kind: int) -> tuple[Any, Any]:
            buffer, ready, free = ((columns, columns_ready, columns_free), (rows, rows_ready, rows_free))[kind]
            slot, counts[kind] = counts[kind] % stages, counts[kind] + 1
            plgpu.barrier_wait(ready.at[slot])
            return buffer.at[slot], free.at[slot]

        def output_projection(accumulator: Any) -> jax.Array:
            taken = []
            for n in range(form.inner // chunk):
                weight, free = take(1)
                plgpu.wgmma(accumulator, o_smem.at[group, n], weight)
                taken.append(free)
                if len(taken) == stages:  # the loader waits for the oldest
                    plgpu.wgmma_wait(0)
                    for one in taken:
                        plgpu.barrier_arrive(one)
                    taken.clear()
            y = accumulator[...]
            for one in taken:
                plgpu.barrier_arrive(one)
            return y

        y = pl.run_scoped(output_projection, plgpu.ACC((TILE, form.width), jnp.float32))
        residual = plgpu.load(x_smem.at[group], layout=FULL).astype(jnp.float32)
        y = _normalise(y + per_column(piece(0), y) + residual, piece(1), piece(2)).astype(form.dtype)
        x_smem[group] = y
        plgpu.commit_smem()

        def ffn(accumulator: Any) -> jax.Array:
            last = None
            for at in range(0, form.hidden, chunk):
                weight, free = take(0)

                def up(hidden: Any, weight: Any = weight) -> jax.Array:
                    plgpu.wgmma(hidden, x_smem.at[group], weight)
                    return hidden[...]

                h = pl.run_scoped(up, plgpu.ACC((TILE, chunk), jnp.float32))
                plgpu.barrier_arrive(free)
                if last is not None:
                    plgpu.barrier_arrive(last)  # reading `hidden` has waited for the product before, too
                h = jnp.maximum(h + per_column(piece(3, at, chunk), h), 0.0).astype(form.dtype)
                weight, last = take(1)
                if form.interpret:  # it takes both operands from shared memory only
                    o_smem[group, 0] = h
                    plgpu.commit_smem()
                    plgpu.wgmma(accumulator, o_smem.at[group, 0], weight)
                else:
                    plgpu.wgmma(accumulator, h, weight)
            y = accumulator[...]
            plgpu.barrier_arrive(last)
            return y

        y = pl.run_scoped(ffn, plgpu.ACC((TILE, form.width), jnp.float32))
        residual = plgpu.load(x_smem.at[group], layout=FULL).astype(jnp.float32)
        y = _normalise(y + per_column(piece(4), y) + residual, piece(5), piece(6)).astype(form.dtype)
        x_smem[group] = y
        plgpu.commit_smem()

        @pl.when(inside)
        def _() -> None:
            plgpu.copy_smem_to_gmem(x_smem.at[group], outputs[0].at[block, mine])

        for at in range(0, form.mixed, chunk):
            weight, free = take(0)

            def project(accumulator: Any, weight: Any = weight) -> jax.Array:
                plgpu.wgmma(accumulator, x_smem.at[group], weight)
                return accumulator[...]

            mixed = pl.run_scoped(project, plgpu.ACC((TILE, chunk), jnp.float32))
            plgpu.barrier_arrive(free)
            which, column = divmod(at, form.mixed // 3)
            staged = at % form.inner // chunk
            if at >= form.inner:  # the piece that lay there must have left
                plgpu.wait_smem_to_gmem(form.inner // chunk - 1, wait_read_only=True)
            o_smem[group, staged] = (mixed + per_column(piece(7, at, chunk), mixed)).astype(form.dtype)
            plgpu.commit_smem()

            @pl.when(inside)
            def _(which: int = which, column: int = column, staged: int = staged) -> None:
                to = outputs[1 + which].at[block, mine, pl.ds(column, chunk)]
                plgpu.copy_smem_to_gmem(o_smem.at[group, staged], to)

        plgpu.wait_smem_to_gmem(0)


def _normalise(y: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """LayerNorm of every row."""
    inverse = 1.0 / y.shape[1]
    centred = y - per_row(y.sum(axis=1) * inverse, y)
    spread = lax.rsqrt((centred * centred).sum(axis=1) * inverse + EPSILON)
    return centred * per_row(spread, y) * per_column(scale, y) + per_column(shift, y)
