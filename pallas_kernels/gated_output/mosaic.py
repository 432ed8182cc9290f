"""The row-wise part of an HSTU layer after its attention as one Mosaic GPU kernel (Hopper); docs/kernels.md."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels import tuned
from flame_jax.pallas_kernels.gated_output.mosaic_body import body
from flame_jax.pallas_kernels.gated_output.mosaic_form import Form, Tiling
from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS, TILE, kernel

__all__ = ["Tiling", "gated_output", "misfit", "tiling_for"]


def gated_output(
    o: jax.Array,
    u: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    *,
    epsilon: float,
    first: int = 0,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.gated_output`. o is [blocks, n - first, values].

    Raises:
        ValueError: `misfit` has something against it, or the tiling does not divide the columns.
    """
    (blocks, rows, values), width = o.shape, x.shape[-1]
    reason = misfit(o.dtype, width, values, rows, plain="output_scale" not in weights)
    if reason:
        raise ValueError(f"gated output on Mosaic GPU: {reason}")
    whole = weights["out_w"].shape[-2] != values
    tiling = tiling or tiling_for({"width": width, "values": values, "whole": whole}, blocks * rows)
    if width % tiling.columns:
        raise ValueError(f"gated output: a width of {width} is not cut into {tiling.columns} columns")
    form = Form(blocks, rows, first, values, width, whole, epsilon, o.dtype, tiling, interpret)
    vectors = [weights[name].astype(jnp.float32) for name in ("output_scale", "output_shift")]
    return _call(jnp.full((1,), layer, jnp.int32), *vectors, o, u, x, weights["out_w"].astype(o.dtype), form)


def tiling_for(shape: Mapping[str, Any], rows: int) -> Tiling:
    """The measured one, or else one that fits the shared memory and leaves few multiprocessors without work."""
    found = tuned.best("gated_output", shape, rows)
    if found:
        return Tiling(**found)
    width, tiles = shape["width"], -(-rows // (2 * TILE))
    for columns, stages in ((256, 3), (128, 5)):
        if width % columns == 0 and tiles * (width // columns) * 2 > MULTIPROCESSORS:
            return Tiling(columns=columns, stages=stages)
    return Tiling(columns=64 if width % 128 else 128, stages=5)


def misfit(dtype: Any, width: int, values: int, rows: int, *, plain: bool) -> str:
    """Why the kernel can't do this; empty where it can.

    Args:
        values: dimensions of all heads' values together.
        rows: token rows, or what they are a multiple of.
        plain: the norm has no weights (HSTU's `research`).
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float16"
    if plain:
        return "the norm has no weights"
    if width % TILE or values % TILE:
        return f"the width is {width} and the heads have {values} values, which are no multiples of {TILE}"
    return f"{rows} rows are no multiple of {TILE}" if rows % TILE else ""


# Layers differ in an operand only, so that a stack of them is lowered once.
@partial(jax.jit, static_argnames="form")
def _call(
    layer: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    o: jax.Array,
    u: jax.Array,
    x: jax.Array,
    weights: jax.Array,
    form: Form,
) -> jax.Array:
    out = jax.ShapeDtypeStruct((form.blocks, form.rows, form.width), o.dtype)
    call = kernel(body, form, out, grid={"block": form.items.clusters}, cluster=form.tiling.cluster)
    return call(layer, scale, shift, o, u, x, weights)
