"""The row-wise part of an HSTU layer before its attention as one Mosaic GPU kernel (Hopper); docs/kernels.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels import tuned
from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS, TILE, kernel
from flame_jax.pallas_kernels.pre_attention.mosaic_body import body
from flame_jax.pallas_kernels.pre_attention.mosaic_form import Form, Tiling

__all__ = ["Tiling", "misfit", "pre_attention", "tiling_for"]

WIDEST = 512
"""Normed rows stay in registers: 128 of them a thread at this width."""


def pre_attention(
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    *,
    sizes: tuple[int, int, int, int],
    gate_only: bool,
    epsilon: float,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `api.pre_attention`. x is [blocks, n, D].

    Raises:
        ValueError: `misfit` has something against it, or the tiling does not divide the columns.
    """
    blocks, rows, width = x.shape
    reason = misfit(x.dtype, width, sizes, rows, plain="input_scale" not in weights)
    if reason:
        raise ValueError(f"pre-attention on Mosaic GPU: {reason}")
    tiling = tiling or tiling_for({"width": width, "sizes": list(sizes)}, blocks * rows)
    if any(size % tiling.chunk for size in sizes) or sum(sizes) // tiling.chunk % tiling.parts:
        raise ValueError(f"pre-attention: {sizes} columns are not cut into {tiling.parts} parts of {tiling.chunk}")
    activated = sizes[0] if gate_only else sum(sizes)
    form = Form(blocks, rows, width, sizes, activated, epsilon, x.dtype, tiling, interpret)
    vectors = [weights[name].astype(jnp.float32) for name in ("input_scale", "input_shift", "uvqk_b")]
    return _call(jnp.full((1,), layer, jnp.int32), *vectors, x, weights["uvqk_w"].astype(x.dtype), form)


def tiling_for(shape: Mapping[str, Any], rows: int) -> Tiling:
    """The measured one, or else one that fits the shared memory and leaves few multiprocessors without work."""
    found = tuned.best("pre_attention", shape, rows)
    if found:
        return Tiling(**found)
    chunk = math.gcd(128, *shape["sizes"])
    chunks, tiles, parts = sum(shape["sizes"]) // chunk, -(-rows // (2 * TILE)), 1
    while tiles * parts * 2 <= MULTIPROCESSORS and chunks % (parts * 2) == 0:
        parts *= 2
    return Tiling(chunk=chunk, parts=parts)


def misfit(dtype: Any, width: int, sizes: tuple[int, ...], rows: int, *, plain: bool) -> str:
    """Why the kernel can't do this; empty where it can.

    Args:
        sizes: columns of u, v, q and k.
        rows: token rows, or what they are a multiple of.
        plain: the norm has no weights (HSTU's `research`).
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float16"
    if plain:
        return "the norm has no weights"
    if width % TILE or width > WIDEST:
        return f"the width is {width}, no multiple of {TILE} up to {WIDEST}"
    if any(size % TILE for size in sizes):
        return f"u, v, q and k have {', '.join(map(str, sizes))} columns, which are no multiples of {TILE}"
    return f"{rows} rows are no multiple of {TILE}" if rows % TILE else ""


# Layers differ in an operand only, so that a stack of them is lowered once.
@partial(jax.jit, static_argnames="form")
def _call(
    layer: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    bias: jax.Array,
    x: jax.Array,
    weights: jax.Array,
    form: Form,
) -> tuple[jax.Array, ...]:
    out = [jax.ShapeDtypeStruct((*x.shape[:2], size), x.dtype) for size in form.sizes]
    call = kernel(body, form, out, grid={"block": form.items.clusters}, cluster=form.tiling.cluster)
    return tuple(call(layer, scale, shift, bias, x, weights))
