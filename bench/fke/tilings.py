"""The block sizes that are tried: what fits a Hopper's registers and shared memory."""

from __future__ import annotations

from flame_jax.pallas_kernels.gated_output.mosaic import Tiling as OutputTiling
from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS
from flame_jax.pallas_kernels.post_attention.mosaic_form import Tiling as LayerTiling
from flame_jax.pallas_kernels.pre_attention.mosaic import Tiling as InputTiling
from flame_jax.pallas_kernels.sumi_attention.mosaic import most_heads
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Tiling as AttentionTiling

SHARED_MEMORY = 227 * 1024
_ROWS = 64


def attention_tilings(heads: int, qk_dim: int, v_dim: int, *, biased: bool) -> list[AttentionTiling]:
    """Block sizes for heads of these dimensions, with the log bias or without one."""
    found = []
    for at_once in sorted({1, most_heads(heads, qk_dim, v_dim)}):
        for warpgroups in (1, 2, 3):
            for keys in (64, 128):
                for stages in (2, 3, 4):
                    own = warpgroups * _ROWS * at_once * (2 * qk_dim + v_dim) * 2
                    steps = stages * keys * (at_once * (qk_dim + v_dim) * 2 + 16 * biased)
                    # Accumulators of the result and the scores, per thread; more of them spill.
                    registers = at_once * (v_dim + keys) // 2
                    limit = 160 if warpgroups < 3 else 96
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


def input_tilings(rows: int) -> list[InputTiling]:
    """Block sizes of `pre_attention` for so many rows, where u, v, q and k have multiples of 128 columns."""
    found = []
    for warpgroups, chunk, stages, pieces in ((2, 128, 6, 4), (2, 128, 8, 4), (1, 128, 8, 4)):
        tiles = -(-rows // (_ROWS * warpgroups))
        for parts in (1, 2, 4):
            # Rows that are few are shared by as many thread blocks as there are multiprocessors, or twice as many.
            if parts == 1 or tiles * parts <= 2 * MULTIPROCESSORS:
                found += [InputTiling(warpgroups, chunk, stages, pieces, parts, cluster) for cluster in (1, 2)]
    return found


def output_tilings(width: int = 512) -> list[OutputTiling]:
    """Block sizes of `gated_output`."""
    found = []
    for warpgroups, columns, stages, pieces in (
        (1, 128, 6, 4),
        *((2, 128, 4, 4), (2, 128, 6, 6), (2, 256, 3, 3), (2, 256, 3, 4)),
        (3, 128, 4, 4),
    ):
        if width % columns == 0:
            found += [OutputTiling(warpgroups, columns, stages, pieces, cluster) for cluster in (1, 2)]
    return found
