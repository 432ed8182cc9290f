"""What one thread block of the layer stack does: 64 rows of one request, through layer after layer.

The rows stay in shared memory. Two warpgroups compute, a third one loads keys, values and weights. Between layers, keys
and values of history rows go through global memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import TILE, Ring, by_role, tile_memory
from flame_jax.pallas_kernels.layer_stack.mosaic_compute import compute
from flame_jax.pallas_kernels.layer_stack.mosaic_form import HALVES, Form
from flame_jax.pallas_kernels.layer_stack.mosaic_load import load
from flame_jax.pallas_kernels.layer_stack.mosaic_work import Barriers, Memory, work_of
from flame_jax.pallas_kernels.sumi_attention.schedule import ROWS


def body(*refs: Any, form: Form) -> None:
    """The kernel; its operands are those of `mosaic._call`."""
    tiles = partial(tile_memory, rows=TILE, width=TILE)
    memory = Memory(
        x=tiles(HALVES, dtype=form.dtype),
        q=tiles(HALVES, dtype=form.dtype),
        k=tiles(HALVES, dtype=form.dtype),
        v=tiles(HALVES, dtype=form.dtype),
        moments=plgpu.SMEM((HALVES, 2, TILE), jnp.float32),
        vectors=plgpu.SMEM((2, sum(form.vectors)), jnp.float32),
        key_logs=plgpu.SMEM((form.window // TILE, 2, TILE), jnp.float32) if form.biased else None,
        staging=tiles(HALVES, dtype=form.dtype) if form.interpret else None,
    )
    buffer = tiles(form.stages, HALVES, dtype=form.dtype)
    ring = Ring.scratch(buffer, stages=form.stages, readers=HALVES, pieces=HALVES)
    barriers = Barriers(
        own_ready=plgpu.Barrier(num_arrivals=4, num_barriers=HALVES),
        logs_ready=plgpu.Barrier(num_arrivals=max(1, form.window // TILE)),
        vectors_ready=plgpu.Barrier(num_arrivals=sum(form.vectors) // TILE, num_barriers=2),
        meet=plgpu.Barrier(num_arrivals=HALVES),
    )
    work = work_of(refs, form)

    def work_off(memory: Memory, ring: Ring, barriers: Barriers) -> None:
        by_role(
            HALVES,
            form.interpret,
            lambda: load(work, memory, ring, barriers, form),
            lambda group: compute(work, group, memory, ring, barriers, form),
        )

    @pl.when(refs[0][lax.axis_index("job"), ROWS] > 0)
    def _() -> None:
        pl.run_scoped(work_off, memory, ring, barriers, collective_axes="warpgroup")
