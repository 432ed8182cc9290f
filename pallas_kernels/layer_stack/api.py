"""The public entry of a stack of post-norm layers."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.post_attention.api import post_attention
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.rows import Drop, keep, linear, thirds
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Softmax


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
    align: int,
    window: int,
    tiles_at_once: int = 1,
    drop: Drop = keep,
    kernels: Kernels = REFERENCE,
) -> tuple[jax.Array, ...]:
    """Layers of SUMI attention with softmax and `post_attention`; through the last one go the candidates alone.

    Args:
        x: [blocks, T, d].
        weights: name -> [layers, blocks, ...]: those of `post_attention`, and qkv with `_w` and `_b`.
        rows: int32[R, 5 + blocks], the packed layout's request rows.
        time: int32[blocks, T], seconds; a candidate's is its request's time.
        temperature: float32[layers, blocks, scenarios, heads].
        coefficients: float32[layers, blocks, scenarios, heads, 3] of the log bias, if there is one.
        following: what follows the last layer.
        first_candidate: token row of the bucket's first candidate row.
        window, tiles_at_once: see `sumi_attention`.
        drop: dropout on the projections' and the FFNs' outputs when training.
        kernels: with `layer_stack` on `mosaic` the layers are one kernel wherever `mosaic.fits` the batch; otherwise
            one after another, on the implementations of `sumi_attention` and `post_attention`.

    Returns:
        The candidate rows' x, [blocks, T - first_candidate, d]; q, k and v of what follows, if anything does.

    Raises:
        ValueError: an implementation can't do this.
    """
    if kernels.layer_stack == "mosaic":
        from flame_jax.pallas_kernels.layer_stack import mosaic

        if drop is not keep:
            raise ValueError("the mosaic implementation has no dropout")
        if mosaic.fits(x.shape[0], x.shape[1], len(rows), window, align):
            return mosaic.layer_stack(
                x,
                weights,
                rows,
                time,
                temperature=temperature,
                coefficients=coefficients,
                following=following,
                first_candidate=first_candidate,
                window=window,
                align=align,
            )
    depth, heads = len(temperature), temperature.shape[-1]
    q, k, v = thirds(linear(x, weights["qkv_w"][0], weights["qkv_b"][0]))
    if depth == 1:
        x, q = x[:, first_candidate:], q[:, first_candidate:]
    found: tuple[jax.Array, ...] = (x, q, k, v)
    for index in range(depth):
        x, *parts = found
        q, k, v = (y.reshape(*y.shape[:-1], heads, -1) for y in parts)
        attended = sumi_attention(
            q,
            k,
            v,
            rows,
            time,
            activation=Softmax(temperature, index),
            bias=None if coefficients is None else LogBias(coefficients, index),
            align=align,
            window=window,
            tiles_at_once=tiles_at_once,
            implementation=kernels.sumi_attention,
        )
        after = following
        if index < depth - 1:
            first = first_candidate if index == depth - 2 else 0
            after = Projection(weights["qkv_w"], weights["qkv_b"], index + 1, first)
        found = post_attention(
            attended.reshape(*attended.shape[:2], -1),
            x,
            weights,
            index,
            following=after,
            drop=drop,
            implementation=kernels.post_attention,
        )
    return found
