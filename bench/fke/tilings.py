"""The block sizes that are tried: what fits a Hopper's registers and shared memory."""

from __future__ import annotations

from flame_jax.pallas_kernels.post_attention.mosaic_form import Tiling as LayerTiling
from flame_jax.pallas_kernels.sumi_attention.mosaic import together
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Tiling as AttentionTiling

SHARED_MEMORY = 227 * 1024
_ROWS = 64


def attention_tilings(heads: int, qk_dim: int, v_dim: int) -> list[AttentionTiling]:
    """Block sizes for heads of these dimensions."""
    at_once, found = together(heads, qk_dim, v_dim), []
    for warpgroups in (1, 2, 3):
        for keys in (64, 128):
            for stages in (2, 3, 4):
                own = warpgroups * _ROWS * at_once * (2 * qk_dim + v_dim) * 2
                steps = stages * keys * (at_once * (qk_dim + v_dim) * 2 + 12)
                # Accumulators of the result and the scores, per thread; more of them spill.
                registers = at_once * (v_dim + keys) // 2
                limit = 160 if warpgroups < 3 else 96
                if own + steps + 1024 <= SHARED_MEMORY and registers <= limit:
                    found.append(AttentionTiling(warpgroups, keys, stages))
    return found


def layer_tilings(width: int = 128, inner: int = 128, vectors: int = 1664) -> list[LayerTiling]:
    """Block sizes for layers of this width."""
    found = []
    for warpgroups in (1, 2, 3):
        for chunk in (64, 128):
            for stages in (2, 3, 4):
                memory = warpgroups * _ROWS * (inner + width) * 2 + 2 * stages * chunk * width * 2 + vectors * 4
                if memory + 1024 <= SHARED_MEMORY and (chunk == 64 or warpgroups < 3):
                    found.append(LayerTiling(warpgroups, chunk, stages))
    return found
