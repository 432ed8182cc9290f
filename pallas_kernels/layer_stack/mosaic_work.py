"""What a thread block of the layer stack is to do, and where everything lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import TILE
from flame_jax.pallas_kernels.layer_stack.mosaic_form import HALVES, WIDTH, Form
from flame_jax.pallas_kernels.post_attention.types import VECTORS
from flame_jax.pallas_kernels.sumi_attention.schedule import (
    FIRST_ROW,
    IS_HISTORY,
    JOB_LENGTH,
    JOB_REQUEST,
    JOB_SCENARIO,
    KEY_START,
    POSITION,
)

PARTS = 1, 2, 0
"""Order in which k, v and q are computed: others wait for the first two."""


class Memory(NamedTuple):
    """Shared memory for 64 rows; every array of [2, ...] has a half for each warpgroup, columns or a head."""

    x: Any  # [2, 64, 64]
    q: Any  # [2, 64, 64], then what the heads attended to
    k: Any  # [2, 64, 64], the rows' own; then, with v, the other warpgroup's part of a sum
    v: Any  # [2, 64, 64]
    moments: Any  # float32[2, 2, 64], means and squared distances from them, of half a row
    vectors: Any  # float32[2, sum(form.vectors)], of a layer and the next one
    key_logs: Any  # float32[window / 64, 2, 64], with a bias
    staging: Any  # [2, 64, 64], in the interpreter: it takes both operands from shared memory only


class Barriers(NamedTuple):
    """Beside those of the ring."""

    own_ready: Any
    logs_ready: Any
    vectors_ready: Any
    meet: Any  # of the warpgroups that compute


class Work(NamedTuple):
    """Scalars of the job, and operands in global memory.

    Attributes:
        begin: position of the first row in its history.
        length: of the history.
        layers: of this launch, that these rows go through.
        tiles: of the request's history.
        arrived: semaphore: halves of such tiles whose keys and values are there, counted over all layers.
        inputs: x, q, k, v of the first layer.
        key_logs: `schedule.key_logs`, for candidates.
        pair_logs: `schedule.pair_logs`, for history rows.
        matrices: output projection, both of the FFN, q, k and v.
        vectors: `VECTORS`, and the bias of q, k and v.
        after: matrix and bias of what follows the last layer.
        between: keys and values of every layer but the first.
    """

    block: jax.Array
    scenario: jax.Array
    row: jax.Array
    key_start: jax.Array
    begin: jax.Array
    is_history: jax.Array
    length: jax.Array
    layers: jax.Array
    tiles: jax.Array
    arrived: Any
    inputs: list[Any]
    temperature: Any
    coefficients: Any
    key_logs: Any
    pair_logs: Any
    matrices: list[Any]
    vectors: list[Any]
    after: list[Any]
    outputs: list[Any]
    between: list[Any]

    @property
    def mine(self) -> Any:
        """The token rows."""
        return pl.ds(self.row, TILE)

    @property
    def steps(self) -> jax.Array:
        """Tiles of keys."""
        return lax.div(self.length + (TILE - 1), TILE)

    def tiles_per_step(self, form: Form) -> jax.Array:
        """Of keys, logarithms of pairs, values."""
        return jnp.where(self.is_history, 2 + form.biased, 2)

    def of_layer(self, stack: Any, layer: Any) -> Any:
        """One layer's weights, of this block unless all share them."""
        return stack.at[layer, jnp.minimum(self.block, stack.shape[1] - 1)]

    def goes_on(self, i: jax.Array, form: Form) -> jax.Array:
        """Whether q, k and v of something are wanted after this launch's layer i."""
        return jnp.logical_or(form.first + i + 1 < form.layers, form.projects)


def work_of(refs: tuple[Any, ...], form: Form) -> Work:
    """From the kernel's operands and outputs, those of `mosaic._call`."""
    jobs, rest = refs[0], list(refs[1:])

    def take(count: int) -> list[Any]:
        return [rest.pop(0) for _ in range(count)]

    number, block = lax.axis_index("job"), lax.axis_index("block")
    inputs = take(4)
    blocks = inputs[0].shape[0]
    arrived = None
    if form.count > 1:  # zero at first
        histories = pl.get_global(plgpu.SemaphoreType.REGULAR((blocks * form.requests,)))
        arrived = histories.at[block * form.requests + jobs[number, JOB_REQUEST]]
    longest = jobs[number, JOB_LENGTH]
    for other in range(1, blocks):
        longest = jnp.maximum(longest, jobs[number, JOB_LENGTH + other])
    row = pl.multiple_of(jobs[number, FIRST_ROW], TILE)
    temperature = take(1)[0]
    coefficients, key_logs, pair_logs = take(3) if form.biased else [None] * 3
    matrices, vectors = take(4), take(len(VECTORS) + 1)
    after = take(2) if form.projects else []
    outputs = take(1 if form.last and not form.projects else 4)
    spared = jnp.where(row < form.first_output, 1, 0)  # the last layer is the candidates' alone
    return Work(
        block=block,
        scenario=jobs[number, JOB_SCENARIO],
        row=row,
        key_start=pl.multiple_of(jobs[number, KEY_START], TILE),
        begin=jobs[number, POSITION],
        is_history=jobs[number, IS_HISTORY] > 0,
        length=jobs[number, JOB_LENGTH + block],
        layers=form.count - spared,
        tiles=lax.div(longest + (TILE - 1), TILE),
        arrived=arrived,
        inputs=inputs,
        temperature=temperature,
        coefficients=coefficients,
        key_logs=key_logs,
        pair_logs=pair_logs,
        matrices=matrices,
        vectors=vectors,
        after=after,
        outputs=outputs,
        between=rest,
    )


def half(group: Any, part: Any = 0) -> Any:
    """Columns of a warpgroup, or of a head, in a part of `WIDTH` columns."""
    return pl.ds(part * WIDTH + group * TILE, TILE)


def halves(rows: Any, matrix: Any, part: Any = 0) -> list[Any]:
    """Of a matrix's rows, a piece for each warpgroup."""
    return [matrix.at[rows, half(group, part)] for group in range(HALVES)]
