"""A warpgroup that computes: of a thread block's 64 rows one head, and 64 columns of everything else."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import COLUMN, FULL, ROW, TILE, Ring, per_column, per_row
from flame_jax.pallas_kernels.layer_stack.mosaic_form import HALVES, WIDTH, Form
from flame_jax.pallas_kernels.layer_stack.mosaic_work import PARTS, Barriers, Memory, Work, half
from flame_jax.pallas_kernels.post_attention.types import IN_MEMORY
from flame_jax.pallas_kernels.rows import EPSILON
from flame_jax.pallas_kernels.sumi_attention.mosaic_step import (
    hidden_pairs,
    known_logs,
    logits_of,
    nothing,
    see_own,
    weigh,
)


class _Layer(NamedTuple):
    """What one warpgroup has while it computes a layer."""

    work: Work
    group: jax.Array
    i: jax.Array  # of this launch
    memory: Memory
    ring: Ring
    barriers: Barriers
    form: Form

    def vector(self, name: str, at: Any) -> jax.Array:
        """64 numbers of one of the layer's vectors, as an accumulator's columns."""
        start = sum(self.form.vectors[: IN_MEMORY.index(name)]) + at
        return plgpu.load(self.memory.vectors.at[lax.rem(self.i, 2), pl.ds(start, TILE)], layout=COLUMN)

    def take(self, number: jax.Array) -> Any:
        """This warpgroup's half of a tile of the ring."""
        return self.ring.take(number).at[self.group]

    def meet(self) -> None:
        """Wait for the other warpgroup."""
        plgpu.barrier_arrive(self.barriers.meet)
        plgpu.barrier_wait(self.barriers.meet)


def compute(work: Work, group: jax.Array, memory: Memory, ring: Ring, barriers: Barriers, form: Form) -> None:
    """All layers."""
    ready, columns = barriers.own_ready.at[group], half(group)
    for source, to in zip(work.inputs, memory[:4], strict=True):
        plgpu.copy_gmem_to_smem(source.at[work.block, work.mine, columns], to.at[group], ready)
    if form.biased:
        plgpu.barrier_wait(barriers.logs_ready)
    plgpu.barrier_wait(ready)

    def layer(i: jax.Array, at: jax.Array) -> jax.Array:
        own = _Layer(work, group, i, memory, ring, barriers, form)
        plgpu.barrier_wait(barriers.vectors_ready.at[lax.rem(i, 2)])
        _attend(own, at)
        at += work.tiles_per_step(form) * work.steps
        y = _product(own, memory.q, at)
        _add_and_norm(own, y, "out_b", "norm1_scale", "norm1_shift")
        at += HALVES
        y = _feed_forward(own, at)
        _add_and_norm(own, y, "ffn2_b", "norm2_scale", "norm2_shift")
        at += 4 * (form.hidden // WIDTH)
        goes_on = work.goes_on(i, form)

        @pl.when(goes_on)
        def _() -> None:
            _project(own, at)

        _store(own)
        return at + jnp.where(goes_on, 3 * HALVES, 0)

    lax.fori_loop(0, work.layers, layer, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend(own: _Layer, at: jax.Array) -> None:
    """One head's attention; the result takes the place of q."""
    work, group, memory, form = own.work, own.group, own.memory, own.form
    factors = _factors(own)
    alone = jnp.logical_or(jnp.logical_not(work.is_history), work.begin + TILE > work.length)
    rows = memory.q.at[group], memory.k.at[group], memory.v.at[group]
    state = lax.cond(
        alone,
        lambda: see_own(rows, work.begin, work.length, work.is_history, factors[0], True),
        lambda: nothing(TILE, True),
    )

    def all_steps(history: bool, state: Any) -> Any:
        whole = lax.div(work.length, TILE)
        state = lax.fori_loop(0, whole, partial(_step, own, at, factors, history, False), state)
        return lax.fori_loop(whole, work.steps, partial(_step, own, at, factors, history, True), state)

    if form.biased:
        state = lax.cond(work.is_history, partial(all_steps, True), partial(all_steps, False), state)
    else:
        state = all_steps(False, state)
    mixed, _, total = state
    memory.q[group] = (mixed * per_row(1.0 / total, mixed)).astype(form.dtype)
    plgpu.commit_smem()
    own.meet()


def _factors(own: _Layer) -> list[Any]:
    """Of q . k and of the bias's three terms, counted in powers of 2."""
    work = own.work
    place = own.form.first + own.i, work.block, work.scenario, own.group
    unit = math.log2(math.e) / work.temperature[place]
    return [unit, *(work.coefficients[*place, c] * unit for c in range(3) if own.form.biased)]


def _step(
    own: _Layer, at: jax.Array, factors: list[Any], history: bool, masked: bool, step: jax.Array, state: Any
) -> Any:
    """Takes 64 keys in; masked where some are beyond the history's end."""
    work, memory, form, key = own.work, own.memory, own.form, step * TILE
    tile = at + work.tiles_per_step(form) * step

    def scores(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, memory.q.at[own.group], own.take(tile).T)
        return accumulator[...]

    logits = pl.run_scoped(scores, plgpu.ACC((TILE, TILE), jnp.float32))
    own.ring.give_back(tile)
    logits = logits_of(logits, factors, _logs(own, step, tile + 1, history))
    hidden = hidden_pairs(work.length, work.begin, key, TILE, False) if masked else None
    weights, mixed, *running = weigh(logits, hidden, state, form.dtype)
    values = tile + work.tiles_per_step(form) - 1
    mixed = _add_product(own, mixed, weights, own.take(values))
    own.ring.give_back(values)
    return mixed, *running


def _logs(own: _Layer, step: jax.Array, tile: jax.Array, history: bool) -> Any:
    """What the bias reads, of pairs or of keys."""
    if not own.form.biased:
        return None
    if not history:
        return known_logs(own.memory.key_logs.at[step])
    pairs = own.ring.take(tile)
    logs = [lax.bitcast_convert_type(plgpu.load(pairs.at[n], layout=FULL), jnp.float16) for n in range(2)]
    own.ring.give_back(tile)
    return [log.astype(jnp.float32) for log in logs]


def _add_product(own: _Layer, before: jax.Array, left: jax.Array, right: Any) -> jax.Array:
    """before + left @ right, left being in registers."""
    if not own.form.interpret:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, left, right))(plgpu.ACC.init(before))
    operand = _left_operand(own, left)

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, operand, right)
        return accumulator[...]

    return before + pl.run_scoped(product, plgpu.ACC(before.shape, jnp.float32))


def _left_operand(own: _Layer, left: jax.Array) -> Any:
    """As `wgmma` takes it: from registers, but for the interpreter."""
    if not own.form.interpret:
        return left
    own.memory.staging[own.group] = left
    plgpu.commit_smem()
    return own.memory.staging.at[own.group]


def _product(own: _Layer, left: Any, at: jax.Array) -> jax.Array:
    """All columns of `left`, [2, 64, 64], times two tiles from number `at` on: float32[64, 64]."""

    def scope(accumulator: Any) -> jax.Array:
        for n in range(HALVES):
            plgpu.wgmma(accumulator, left.at[n], own.take(at + n))
        return accumulator[...]

    product = pl.run_scoped(scope, plgpu.ACC((TILE, TILE), jnp.float32))
    for n in range(HALVES):
        own.ring.give_back(at + n)
    return product


def _add_and_norm(own: _Layer, y: jax.Array, bias: str, scale: str, shift: str) -> None:
    """x = norm(x + y + bias); mean and variance come from both warpgroups' columns."""
    memory, group, start = own.memory, own.group, own.group * TILE
    y = y + per_column(own.vector(bias, start), y) + plgpu.load(memory.x.at[group], layout=FULL).astype(jnp.float32)
    mean = y.sum(axis=1) * (1.0 / TILE)
    centred = y - per_row(mean, y)
    memory.moments[group, 0] = mean
    memory.moments[group, 1] = (centred * centred).sum(axis=1)
    own.meet()
    means, squares = ([plgpu.load(memory.moments.at[n, k], layout=ROW) for n in range(HALVES)] for k in range(2))
    apart = means[0] - means[1]
    spread = lax.rsqrt((squares[0] + squares[1] + apart * apart * (TILE / 2)) * (1.0 / WIDTH) + EPSILON)
    centred = y - per_row((means[0] + means[1]) * 0.5, y)
    normed = centred * per_row(spread, y) * per_column(own.vector(scale, start), y)
    memory.x[group] = (normed + per_column(own.vector(shift, start), y)).astype(own.form.dtype)
    plgpu.commit_smem()
    own.meet()


def _feed_forward(own: _Layer, at: jax.Array) -> jax.Array:
    """This warpgroup's columns of the FFN's output. Each has half of the hidden layer; they add up at the end."""
    group, memory, form = own.group, own.memory, own.form
    last = form.hidden // WIDTH - 1

    def hidden(chunk: Any) -> jax.Array:
        raw = _product(own, memory.x, at + 4 * chunk)
        raw = raw + per_column(own.vector("ffn1_b", chunk * WIDTH + group * TILE), raw)
        return jnp.maximum(raw, 0.0).astype(form.dtype)

    def scope(*accumulators: Any) -> list[jax.Array]:
        def add(chunk: Any, left: jax.Array) -> None:
            operand = _left_operand(own, left)
            for n, accumulator in enumerate(accumulators):
                plgpu.wgmma(accumulator, operand, own.take(at + 4 * chunk + HALVES + n))

        def give_back(chunk: Any) -> None:
            for n in range(HALVES):
                own.ring.give_back(at + 4 * chunk + HALVES + n)

        def step(chunk: jax.Array, before: jax.Array) -> jax.Array:
            add(chunk - 1, before)
            following = hidden(chunk)  # whose product waits for the other two
            give_back(chunk - 1)
            return following

        add(last, lax.fori_loop(1, last + 1, step, hidden(0)))
        sums = [accumulator[...] for accumulator in accumulators]
        give_back(last)
        return sums

    sums = pl.run_scoped(scope, *[plgpu.ACC((TILE, TILE), jnp.float32)] * HALVES)

    def exchange(theirs: int) -> jax.Array:
        # In two parts of 8 bits each, where k and v lie, which are done with.
        coarse = sums[theirs].astype(form.dtype)
        memory.k[theirs] = coarse
        memory.v[theirs] = (sums[theirs] - coarse.astype(jnp.float32)).astype(form.dtype)
        own.meet()
        coarse, rest = (plgpu.load(ref.at[1 - theirs], layout=FULL).astype(jnp.float32) for ref in (memory.k, memory.v))
        return sums[1 - theirs] + (coarse + rest)

    return lax.cond(group == 0, partial(exchange, 1), partial(exchange, 0))


def _project(own: _Layer, at: jax.Array) -> None:
    """q, k and v of what follows: one head of each."""
    memory = own.memory
    for n, part in enumerate(PARTS):
        raw = _product(own, memory.x, at + HALVES * n)
        bias = own.vector("next_b", part * WIDTH + own.group * TILE)
        (memory.q, memory.k, memory.v)[part][own.group] = (raw + per_column(bias, raw)).astype(own.form.dtype)
        if n == 1:
            plgpu.commit_smem()
            _send_history(own)
    plgpu.commit_smem()


def _send_history(own: _Layer) -> None:
    """Keys and values of history rows, to the thread blocks that wait for them; `_store` tells when they are there."""
    work, form = own.work, own.form
    if form.count > 1:

        @pl.when(_is_sent(own))
        def _() -> None:
            for source, array in zip((own.memory.k, own.memory.v), work.between, strict=True):
                to = array.at[own.i, work.block, work.mine, half(own.group)]
                plgpu.copy_smem_to_gmem(source.at[own.group], to)


def _is_sent(own: _Layer) -> jax.Array:
    return jnp.logical_and(own.i + 1 < own.form.count, own.work.is_history)


def _store(own: _Layer) -> None:
    """After the last layer everything that is wanted; before, tell who waits for keys and values."""
    work, group, form = own.work, own.group, own.form

    @pl.when(jnp.logical_and(own.i + 1 == form.count, work.row >= form.first_output))
    def _() -> None:
        rows = pl.ds(work.row - form.first_output, TILE)
        for source, output in zip(own.memory[: len(work.outputs)], work.outputs, strict=True):
            plgpu.copy_smem_to_gmem(source.at[group], output.at[work.block, rows, half(group)])

    if form.count > 1:

        @pl.when(_is_sent(own))
        def _() -> None:
            plgpu.wait_smem_to_gmem(0)
            plgpu.semaphore_signal(work.arrived, memory_scope="gpu")
