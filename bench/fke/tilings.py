"""The block sizes that are tried: what fits a Hopper's registers and shared memory."""

from __future__ import annotations

from flame_jax.pallas_kernels.post_attention.mosaic_form import Tiling as LayerTiling
from flame_jax.pallas_kernels.sumi_attention.mosaic import most_heads
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Tiling as AttentionTiling

SHARED_MEMORY = 227 * 1024
_ROWS = 64


def attention_tilings(heads: int, qk_dim: int, v_dim: int) -> list[AttentionTiling]:
    """Block sizes for heads of these dimensions."""
    found = []
    for at_once in sorted({1, most_heads(heads, qk_dim, v_dim)}):
        for warpgroups in (1, 2, 3):
            for keys in (64, 128):
                for stages in (2, 3, 4):
                    own = warpgroups * _ROWS * at_once * (2 * qk_dim + v_dim) * 2
                    steps = stages * keys * (at_once * (qk_dim + v_dim) * 2 + 12)
                    # Of scores and weights two each, results, the other heads' bias; more of them spill.
                    registers = 3 * keys // 2 + at_once * v_dim // 2 + (keys // 2 if at_once > 1 else 0)
                    limit = 192 if warpgroups < 3 else 128
                    if own + steps + 1024 <= SHARED_MEMORY and registers <= limit:
                        found.append(AttentionTiling(warpgroups, keys, stages, at_once))
    return found


def layer_tilings(width: int = 128, inner: int = 128, vectors: int = 1664) -> list[LayerTiling]:
    """Block sizes for layers of this width."""
    found = []
    for warpgroups in (1, 2, 3):
        for stages in (2, 3, 4):
            memory = warpgroups * _ROWS * (inner + width) * 2 + 2 * stages * _ROWS * width * 2 + vectors * 4
            if memory + 1024 <= SHARED_MEMORY:
                found.append(LayerTiling(warpgroups, _ROWS, stages))  # twice as wide, accumulators spill
    return found
