"""A stack of post-norm layers as one Mosaic GPU kernel (Hopper); docs/kernels.md, "Layer stack"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS, TILE, kernel
from flame_jax.pallas_kernels.layer_stack.mosaic_body import body
from flame_jax.pallas_kernels.layer_stack.mosaic_form import WIDTH, Form
from flame_jax.pallas_kernels.post_attention.types import Projection, layer_weights
from flame_jax.pallas_kernels.rows import linear, thirds
from flame_jax.pallas_kernels.segments import owned
from flame_jax.pallas_kernels.sumi_attention.schedule import jobs, key_logs, limit, pair_logs

AT_ONCE = 4
"""Such kernels that may run at the same time, of several streams or processes.

Thread blocks of a request wait for each other. Those of a kernel start in the order of their numbers, a request's
histories of all blocks before its candidates, so that of every kernel one request at most waits for thread blocks that
have not started. Where these fit the GPU together, none waits forever.
"""
WIDEST = 4096
"""Columns of the hidden layer that leave the ring enough tiles in shared memory."""


def layer_stack(
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    rows: jax.Array,
    time: jax.Array,
    *,
    temperature: jax.Array,
    coefficients: jax.Array | None,
    following: Projection | None,
    first_candidate: int,
    window: int,
    align: int,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `api.layer_stack`.

    Args:
        interpret: run on the CPU, slowly, and a launch per layer: thread blocks run one after another there.

    Raises:
        ValueError: `misfit` has something against it, or not all thread blocks would be on the GPU at once.
    """
    depth, (blocks, tokens, width) = len(weights["out_w"]), x.shape
    if reason := misfit(x.dtype, width, temperature.shape[-1], weights["ffn1_w"].shape[-1], align):
        raise ValueError(f"a layer stack on Mosaic GPU: {reason}")
    if not fits(blocks, tokens, len(rows), window, align):
        raise ValueError(f"a layer stack on Mosaic GPU: {x.shape[:2]} rows, or histories of {window}, are too many")
    form = Form(
        layers=depth,
        first=0,
        count=1 if interpret else depth,
        requests=len(rows),
        window=-(-window // TILE) * TILE,
        hidden=weights["ffn1_w"].shape[-1],
        first_candidate=first_candidate,
        biased=coefficients is not None,
        projects=following is not None,
        dtype=x.dtype,
        interpret=interpret,
    )
    fixed = [jobs(rows, align=align, first=0, last=tokens, size=TILE)]
    numbers = [temperature]
    if coefficients is not None:
        pairs = pair_logs(rows, time, align=align, window=form.window)
        numbers += [coefficients, key_logs(rows, time, align=align), lax.bitcast_convert_type(pairs, x.dtype)]
    *matrices, vectors = layer_weights(weights, x.dtype)
    stack = [*matrices, weights["qkv_w"].astype(x.dtype), *vectors, weights["qkv_b"].astype(jnp.float32)]
    if following is not None:
        own = slice(following.layer, following.layer + 1)
        stack += [following.weight[own].astype(x.dtype), following.bias[own].astype(jnp.float32)]
    # Rows of no request hold what an earlier batch left. A weight of 0 would not silence a NaN there.
    x = jnp.where(owned(rows, tokens, align=align)[..., None], x, jnp.zeros((), x.dtype))
    state = [x, *thirds(linear(x, weights["qkv_w"][0], weights["qkv_b"][0]))]
    for first in range(0, depth, form.count):
        state = _call([*fixed, *state, *numbers, *stack], replace(form, first=first))
    return tuple(state)


def fits(blocks: int, tokens: int, requests: int, window: int, align: int) -> bool:
    """Whether a batch's rows are few enough: there is a multiprocessor for every thread block (see `AT_ONCE`)."""
    waiting = blocks * -(-window // TILE)
    return blocks * limit(tokens, requests, align, TILE) <= MULTIPROCESSORS and AT_ONCE * waiting <= MULTIPROCESSORS


def misfit(dtype: Any, width: int, heads: int, hidden: int, align: int) -> str:
    """Why the kernel can't do this; empty where it can."""
    if dtype != jnp.bfloat16:
        return f"dtype {jnp.dtype(dtype)} is not bfloat16"
    if width != WIDTH or heads * TILE != WIDTH:
        return f"a model of width {width} with {heads} heads is not one of {WIDTH} with heads of {TILE}"
    if hidden % WIDTH or hidden > WIDEST:
        return f"a hidden layer of {hidden} columns is no multiple of {WIDTH} up to {WIDEST}"
    if align != TILE:
        return f"the layout's alignment is {align}, not {TILE}"
    return ""


@partial(jax.jit, static_argnames="form")
def _call(operands: list[jax.Array], form: Form) -> list[jax.Array]:
    work, x, *_ = operands
    blocks, tokens, width = x.shape
    outputs = 1 if form.last and not form.projects else 4
    out = [jax.ShapeDtypeStruct((blocks, tokens - form.first_output, width), form.dtype)] * outputs
    # Keys and values of histories by layer: whoever is behind still reads the last ones.
    between = [jax.ShapeDtypeStruct((form.count - 1, blocks, tokens, width), form.dtype)] * 2
    grid = {"job": len(work), "block": blocks}
    results = kernel(body, form, [*out, *(between if form.count > 1 else [])], grid=grid)(*operands)
    return list(results[:outputs])
