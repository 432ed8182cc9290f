"""The weights of a stack of post-norm layers, as kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

VECTORS = ("out_b", "norm1_scale", "norm1_shift", "ffn1_b", "ffn2_b", "norm2_scale", "norm2_shift")


class LayerWeights(NamedTuple):
    """Stacked over [layers, blocks], so that a kernel picks a layer by number and nothing is cut out and copied.

    Attributes:
        qkv_w: [layers, blocks, d, 3 * inner], in the activations' dtype, as the other matrices.
        out_w: [layers, blocks, inner, d].
        ffn1_w: [layers, blocks, d, ffn].
        ffn2_w: [layers, blocks, ffn, d].
        vectors: float32[layers, blocks, 6 * d + ffn + 3 * inner], `VECTORS` one after another and then the *next*
            layer's qkv_b (the last layer's holds the first one's).
    """

    qkv_w: jax.Array
    out_w: jax.Array
    ffn1_w: jax.Array
    ffn2_w: jax.Array
    vectors: jax.Array


def layer_weights(weights: Mapping[str, jax.Array], dtype: jnp.dtype) -> LayerWeights:
    """From named weights with leading axes [layers, blocks]."""
    vectors = [weights[name] for name in VECTORS] + [jnp.roll(weights["qkv_b"], -1, axis=0)]
    qkv_w, out_w, ffn1_w, ffn2_w = (weights[name].astype(dtype) for name in ("qkv_w", "out_w", "ffn1_w", "ffn2_w"))
    return LayerWeights(qkv_w, out_w, ffn1_w, ffn2_w, jnp.concatenate(vectors, axis=-1).astype(jnp.float32))
