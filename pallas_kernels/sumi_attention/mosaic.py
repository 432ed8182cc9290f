"""SUMI attention as one Mosaic GPU kernel (Hopper); docs/kernels.md, "SUMI attention"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flame_jax.pallas_kernels import tuned
from flame_jax.pallas_kernels.hopper import TILE, kernel
from flame_jax.pallas_kernels.segments import histories_elsewhere
from flame_jax.pallas_kernels.sumi_attention.mosaic_body import body
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Form, Tiling
from flame_jax.pallas_kernels.sumi_attention.schedule import jobs, key_logs, page_logs, time_parts
from flame_jax.pallas_kernels.sumi_attention.types import Activation, Bias, LogBias, Pages, Silu, Softmax, TableBias


def sumi_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    time: jax.Array,
    *,
    activation: Activation,
    bias: Bias | None,
    causal: bool,
    align: int,
    history: Pages | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.sumi_attention`.

    Args:
        interpret: run on the CPU, slowly.

    Raises:
        ValueError: `misfit` has something against it; a step of `tiling` would not lie in one page.
    """
    _, tokens, heads, qk_dim = k.shape
    v_dim = v.shape[-1]
    if reason := misfit(v.dtype, qk_dim, v_dim, align, bias):
        raise ValueError(f"SUMI attention on Mosaic GPU: {reason}")
    page_rows = 0 if history is None else history.page_rows
    shape = tuned_shape(heads, qk_dim, v_dim, activation, bias, causal and not page_rows)
    tiling = tiling or _in_page(tiling_for(shape, q.shape[0] * q.shape[1], paged=page_rows > 0), page_rows)
    if page_rows % tiling.keys:
        raise ValueError(f"SUMI attention on Mosaic GPU: a page of {page_rows} rows is no steps of {tiling.keys} keys")
    form = Form(
        heads=heads,
        together=tiling.heads or most_heads(heads, qk_dim, v_dim),
        qk_dim=qk_dim,
        v_dim=v_dim,
        scale=activation.scale if isinstance(activation, Silu) else None,
        divisor=activation.divisor if isinstance(activation, Silu) else 1.0,
        biased=isinstance(bias, LogBias),
        causal=causal and not page_rows,
        align=align,
        first=tokens - q.shape[1],
        dtype=v.dtype,
        tiling=tiling,
        interpret=interpret,
        page_rows=page_rows,
    )
    cut = rows if history is None else histories_elsewhere(rows, align)
    work = jobs(cut, align=align, first=form.first, last=tokens, size=TILE * tiling.warpgroups)
    operands = [work, *map(_flat, (q, k, v))]
    if isinstance(activation, Softmax):
        operands += _stacked(activation.temperature, activation.layer)
    if isinstance(bias, LogBias):
        operands += [*_stacked(bias.coefficients, bias.layer), *_distances(rows, time, history, align)]
    if history is not None:
        operands += [history.table, *map(_flat, (history.k, history.v))]
    return _call(operands, form).reshape(*q.shape[:3], v_dim)


def _flat(x: jax.Array) -> jax.Array:
    """[blocks, ..., heads, dim] -> [blocks, rows, heads * dim]; pages follow each other."""
    return x.reshape(len(x), -1, x.shape[-2] * x.shape[-1])


def _distances(rows: jax.Array, time: jax.Array, history: Pages | None, align: int) -> list[jax.Array]:
    """What the log bias reads of histories: times, for history rows, of which there are none with pages; logarithms."""
    if history is None:
        return [time_parts(time), key_logs(rows, time, align=align)]
    return [page_logs(rows, history.table, history.times)]


def _stacked(numbers: jax.Array, layer: int | None) -> list[jax.Array]:
    """A stack, and which layer of it is meant."""
    return [numbers[None] if layer is None else numbers, jnp.full((1,), layer or 0, jnp.int32)]


def misfit(dtype: Any, qk_dim: int, v_dim: int, align: int, bias: type | Bias | None) -> str:
    """Why the kernel can't do this; empty where it can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float16"
    if {qk_dim, v_dim} - {32, 64, 128, 256}:
        return f"a head has {qk_dim} and {v_dim} dimensions, not 32, 64, 128 or 256"
    if align % 16:
        return f"the layout's alignment of {align} is no multiple of 16"
    if bias is TableBias or isinstance(bias, TableBias):
        return "it can't look a bias up in a table: Mosaic GPU has no gather"
    return ""


def most_heads(heads: int, qk_dim: int, v_dim: int) -> int:
    """Heads of one thread block, which share a tile's logarithms: as many as registers allow."""
    widest = max(qk_dim, v_dim, TILE)
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * widest <= 128))


def tuned_shape(
    heads: int, qk_dim: int, v_dim: int, activation: Activation, bias: Bias | None, causal: bool
) -> dict[str, Any]:
    """What measured block sizes are looked up by."""
    return {
        "qk_dim": qk_dim,
        "v_dim": v_dim,
        "heads": most_heads(heads, qk_dim, v_dim),
        "softmax": isinstance(activation, Softmax),
        "bias": isinstance(bias, LogBias),
        "causal": causal,
    }


def tiling_for(shape: Mapping[str, Any], rows: int, *, paged: bool = False) -> Tiling:
    """The measured one, or else one that fits the registers and the shared memory."""
    if found := tuned.best("paged_attention" if paged else "sumi_attention", shape, rows):
        return Tiling(**found)
    if max(shape["qk_dim"], shape["v_dim"]) <= 128:
        return Tiling(warpgroups=2)
    return Tiling(warpgroups=1, stages=1 if shape["bias"] else 2)


def _in_page(tiling: Tiling, page_rows: int) -> Tiling:
    """With steps that lie in one page each."""
    return tiling if page_rows % tiling.keys == 0 else replace(tiling, keys=TILE)


# Layers differ in operands only, so that a stack of them is lowered once.
@partial(jax.jit, static_argnames="form")
def _call(operands: list[jax.Array], form: Form) -> jax.Array:
    work, q, *_ = operands
    out = jax.ShapeDtypeStruct((*q.shape[:2], form.heads * form.v_dim), form.dtype)
    grid = {"job": len(work), "stack": len(q) * (form.heads // form.together)}
    return kernel(body, form, out, grid=grid)(*operands)
