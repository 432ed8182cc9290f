"""The weights of a stack of post-norm layers, as kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

VECTORS = ("out_b", "norm1_scale", "norm1_shift", "ffn1_b", "ffn2_b", "norm2_scale", "norm2_shift")
IN_MEMORY = (*VECTORS, "next_b")
"""Order in shared memory, with the following layer's bias."""


class Projection(NamedTuple):
    """q, k and v of the layer that follows.

    Attributes:
        weight: [layers, blocks or 1, d, 3 * inner].
        bias: [layers, blocks or 1, 3 * inner].
        layer: which of them.
        first: rows before it are keys only in that layer: they have neither q nor x.
    """

    weight: jax.Array
    bias: jax.Array
    layer: int
    first: int = 0


class LayerWeights(NamedTuple):
    """Stacked over [layers, blocks], so that a kernel picks a layer by number and nothing is cut out or put together.

    Where blocks share their weights, that axis has length 1.

    Attributes:
        out_w: [layers, blocks, inner, d], in the activations' dtype, as the other matrices.
        ffn1_w: [layers, blocks, d, ffn].
        ffn2_w: [layers, blocks, ffn, d].
        vectors: float32[layers, blocks, d or ffn] each, those of `VECTORS`.
    """

    out_w: jax.Array
    ffn1_w: jax.Array
    ffn2_w: jax.Array
    vectors: list[jax.Array]


def layer_weights(weights: Mapping[str, jax.Array], dtype: jnp.dtype) -> LayerWeights:
    """From named weights with leading axes [layers, blocks]."""
    out_w, ffn1_w, ffn2_w = (weights[name].astype(dtype) for name in ("out_w", "ffn1_w", "ffn2_w"))
    return LayerWeights(out_w, ffn1_w, ffn2_w, [weights[name].astype(jnp.float32) for name in VECTORS])
