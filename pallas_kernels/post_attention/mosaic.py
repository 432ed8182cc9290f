"""The row-wise rest of a post-norm transformer layer as one Mosaic GPU kernel (Hopper); docs/kernels.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels import tuned
from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS, TILE, kernel
from flame_jax.pallas_kernels.post_attention.mosaic_body import body
from flame_jax.pallas_kernels.post_attention.mosaic_form import Form, Tiling
from flame_jax.pallas_kernels.post_attention.types import Projection, layer_weights


def post_attention(
    attended: jax.Array,
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: int,
    following: Projection | None = None,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `api.post_attention`.

    Args:
        interpret: run on the CPU, slowly.

    Raises:
        ValueError: `misfit` has something against it.
    """
    blocks, rows, width = x.shape
    *matrices, vectors = layer_weights(weights, x.dtype)
    inner, hidden = attended.shape[-1], weights["ffn1_w"].shape[-1]
    first = 0 if following is None else following.first
    if reason := misfit(x.dtype, width, inner, hidden, math.gcd(rows, first)):
        raise ValueError(f"post-attention on Mosaic GPU: {reason}")
    after = []
    if following is not None:
        bias, weight = following.bias.astype(jnp.float32), following.weight.astype(x.dtype)
        after = [_number(following.layer), bias, weight]
    tiling = tiling or tiling_for({"width": width, "inner": inner, "hidden": hidden}, blocks * rows)
    form = Form(
        width=width,
        inner=inner,
        hidden=hidden,
        rows=rows,
        first=first,
        projects=following is not None,
        dtype=x.dtype,
        tiling=tiling,
        interpret=interpret,
    )
    return _call([_number(layer), attended, x, *matrices, *vectors, *after], form)


def _number(layer: int) -> jax.Array:
    # One each: of two together, where they are 0 and 1, XLA makes a kernel that counts.
    return jnp.full((1,), layer, jnp.int32)


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


# Layers differ in operands only, so that a stack of them is lowered once.
@partial(jax.jit, static_argnames="form")
def _call(operands: list[jax.Array], form: Form) -> tuple[jax.Array, ...]:
    x = operands[2]
    blocks = len(x)
    rows = [form.rows - form.first] * 2 + [form.rows] * 2 if form.projects else [form.rows]
    widths = [form.width] + [form.inner] * 3
    shapes = [jax.ShapeDtypeStruct((blocks, n, width), x.dtype) for n, width in zip(rows, widths, strict=False)]
    grid = {"worker": min(form.tiles, max(1, MULTIPROCESSORS // blocks)), "block": blocks}
    return tuple(kernel(body, form, shapes, grid=grid)(*operands))
