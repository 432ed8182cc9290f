"""What one thread block of the Mosaic GPU kernel does: a job's query rows of some heads, against its request's keys.

The last warpgroup loads keys and values, `Tiling.stages` steps ahead; the others compute, 64 query rows each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flame_jax.pallas_kernels.hopper import (
    FULL,
    TILE,
    by_role,
    drain,
    free_slot,
    per_row,
    tile_memory,
)
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Form, Memory
from flame_jax.pallas_kernels.sumi_attention.mosaic_step import (
    hidden_pairs,
    known_logs,
    logits_of,
    mix,
    nothing,
    pair_logs,
    scores_of,
    see_own,
    weigh,
)
from flame_jax.pallas_kernels.sumi_attention.schedule import (
    FIRST_ROW,
    IS_HISTORY,
    JOB_LENGTH,
    JOB_REQUEST,
    JOB_SCENARIO,
    KEY_START,
    POSITION,
    ROWS,
)


class _Barriers(NamedTuple):
    q_ready: Any
    own_ready: Any
    k_ready: Any
    v_ready: Any
    tail_ready: Any
    consumed: Any


class _Job(NamedTuple):
    """What is to be done: scalars, and the operands in global memory.

    Attributes:
        key_start: row of the request's first key, in `key_log` and, unless they lie in pages, in `keys` and `values`.
        pages: of the request's history, in order; None where they lie among the token rows.
        k, v: of token rows.
        keys, values: of histories.
    """

    block: jax.Array
    head: jax.Array
    row: jax.Array
    rows: jax.Array
    key_start: jax.Array
    position: jax.Array
    is_history: jax.Array
    length: jax.Array
    scenario: jax.Array
    steps: jax.Array
    q: Any
    k: Any
    v: Any
    pages: Any
    keys: Any
    values: Any
    temperature: Any
    coefficients: Any
    time: Any
    key_log: Any
    out: Any


def body(*refs: Any, form: Form) -> None:
    """The kernel; its operands are those of `mosaic._call`."""
    w, s, n, keys = form.tiling.warpgroups, form.tiling.stages, form.together, form.tiling.keys
    work, number = refs[0], lax.axis_index("job")
    tiles = partial(tile_memory, dtype=form.dtype)
    memory = Memory(
        q=tiles(w, n, rows=TILE, width=form.qk_dim),
        own_k=tiles(w, n, rows=TILE, width=form.qk_dim),
        own_v=tiles(w, n, rows=TILE, width=form.v_dim),
        k=tiles(s, n, rows=keys, width=form.qk_dim),
        v=tiles(s, n, rows=keys, width=form.v_dim),
        own_time=plgpu.SMEM((w, 2, TILE), jnp.float32) if form.timed else None,
        key_time=plgpu.SMEM((s, 2, keys), jnp.float32) if form.timed else None,
        key_log=plgpu.SMEM((s, 2, keys), jnp.float32) if form.biased else None,
        weights=tiles(w, rows=TILE, width=keys) if form.interpret else None,
    )
    barriers = _Barriers(
        q_ready=plgpu.Barrier(num_arrivals=n + form.timed, num_barriers=w),
        own_ready=plgpu.Barrier(num_arrivals=2 * n, num_barriers=w),
        k_ready=plgpu.Barrier(num_arrivals=n + form.biased + form.timed, num_barriers=s),
        v_ready=plgpu.Barrier(num_arrivals=n, num_barriers=s),
        tail_ready=plgpu.Barrier(num_arrivals=n),
        consumed=plgpu.Barrier(num_arrivals=w, num_barriers=s),
    )

    def work_off(memory: Memory, barriers: _Barriers) -> None:
        job = _job(refs, number, form)
        by_role(
            w,
            form.interpret,
            lambda: _load(job, memory, barriers, form),
            lambda group: _compute(job, group, memory, barriers, form),
        )

    @pl.when(work[number, ROWS] > 0)
    def _() -> None:
        pl.run_scoped(work_off, memory, barriers, collective_axes="warpgroup")


def _job(refs: tuple[Any, ...], number: jax.Array, form: Form) -> _Job:
    work, q, k, v, *rest, out = refs
    temperature = _own_layer(rest) if form.softmax else None
    coefficients = _own_layer(rest) if form.biased else None
    time = rest.pop(0) if form.timed else None
    key_log = rest.pop(0) if form.biased else None
    table, keys, values = rest if form.page_rows else (None, k, v)
    stack, groups = lax.axis_index("stack"), form.heads // form.together
    block = lax.div(stack, groups)
    rows, position, length = work[number, ROWS], work[number, POSITION], work[number, JOB_LENGTH + block]
    is_history = work[number, IS_HISTORY] > 0
    pages, key_start = None, pl.multiple_of(work[number, KEY_START], form.align)
    if table is not None:
        request = work[number, JOB_REQUEST]
        pages, key_start = table.at[request], request * (table.shape[1] * form.page_rows)
    seen = length
    if form.causal:
        seen = jnp.where(is_history, jnp.minimum(length, position + rows), length)
    return _Job(
        block=block,
        head=lax.rem(stack, groups) * form.together,
        row=pl.multiple_of(work[number, FIRST_ROW], form.align),
        rows=rows,
        key_start=key_start,
        position=position,
        is_history=is_history,
        length=length,
        scenario=work[number, JOB_SCENARIO],
        steps=lax.div(seen + (form.tiling.keys - 1), form.tiling.keys),
        q=q,
        k=k,
        v=v,
        pages=pages,
        keys=keys,
        values=values,
        temperature=temperature,
        coefficients=coefficients,
        time=time,
        key_log=key_log,
        out=out,
    )


def _own_layer(operands: list[Any]) -> Any:
    """Take a stack and a number off the list."""
    stack, layer = operands.pop(0), operands.pop(0)
    return stack.at[layer[0]]


def _columns(job: _Job, i: int, width: int) -> Any:
    """Of the thread block's head `i`."""
    return pl.ds((job.head + i) * width, width)


def _load(job: _Job, memory: Memory, barriers: _Barriers, form: Form) -> None:
    """Keys and values, step by step, into whatever stage is free."""
    stages, keys = form.tiling.stages, form.tiling.keys

    @pl.loop(0, job.steps)
    def _(step: jax.Array) -> None:
        at = pl.ds(_first_key(job, step, form), keys)  # before it waits: a page's number takes its time to come
        slot = free_slot(step, stages, barriers.consumed)
        k_ready = barriers.k_ready.at[slot]
        for i in range(form.together):
            source = job.keys.at[job.block, at, _columns(job, i, form.qk_dim)]
            plgpu.copy_gmem_to_smem(source, memory.k.at[slot, i], k_ready)
        if form.timed:
            plgpu.copy_gmem_to_smem(job.time.at[job.block, :, at], memory.key_time.at[slot], k_ready)
        if form.biased:
            logs = job.key_log.at[job.block, :, pl.ds(job.key_start + step * keys, keys)]
            plgpu.copy_gmem_to_smem(logs, memory.key_log.at[slot], k_ready)
        whole = (step + 1) * keys <= job.length

        def load_values(ready: Any) -> None:
            for i in range(form.together):
                source = job.values.at[job.block, at, _columns(job, i, form.v_dim)]
                plgpu.copy_gmem_to_smem(source, memory.v.at[slot, i], ready)

        @pl.when(whole)
        def _() -> None:
            load_values(barriers.v_ready.at[slot])

        @pl.when(jnp.logical_not(whole))
        def _() -> None:
            load_values(barriers.tail_ready)
            plgpu.barrier_wait(barriers.tail_ready)
            _clear_tail(memory.v.at[slot], job.length - step * keys, form)
            for _ in range(form.together):
                plgpu.barrier_arrive(barriers.v_ready.at[slot])

    drain(job.steps, stages, barriers.consumed)


def _first_key(job: _Job, step: jax.Array, form: Form) -> jax.Array:
    """Row of the step's first key in `keys` and `values`. A step lies in one page."""
    key = step * form.tiling.keys
    if job.pages is None:
        return job.key_start + key
    page = job.pages[lax.div(key, form.page_rows)]
    return pl.multiple_of(page * form.page_rows + lax.rem(key, form.page_rows), form.tiling.keys)


def _clear_tail(v: Any, first: jax.Array, form: Form) -> None:
    """Values from row `first` on are not the request's: a weight of 0 would not silence a NaN there."""
    for i in range(form.together):
        for at in range(0, form.tiling.keys, TILE):
            rows = v.at[i, pl.ds(at, TILE)]
            values = plgpu.load(rows, layout=FULL)
            beyond = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=FULL) + at >= first
            rows[...] = jnp.where(beyond, jnp.zeros_like(values), values)
    plgpu.commit_smem()


def _compute(job: _Job, group: jax.Array, memory: Memory, barriers: _Barriers, form: Form) -> None:
    """One warpgroup's 64 query rows."""
    offset = group * TILE
    begin = job.position + offset  # of these rows in the history
    alone = jnp.logical_or(jnp.logical_not(job.is_history), begin + TILE > job.length)
    _load_own(job, group, alone, memory, barriers, form)
    factors = [_factors(job, i, form) for i in range(form.together)]
    plgpu.barrier_wait(barriers.q_ready.at[group])

    def own_keys() -> Any:
        plgpu.barrier_wait(barriers.own_ready.at[group])
        return tuple(
            see_own(
                (memory.q.at[group, i], memory.own_k.at[group, i], memory.own_v.at[group, i]),
                begin,
                job.length,
                job.is_history,
                factors[i][0],
                form.softmax,
            )
            for i in range(form.together)
        )

    state = lax.cond(alone, own_keys, lambda: (nothing(form.v_dim, form.softmax),) * form.together)

    def all_steps(history: bool, state: Any) -> Any:
        keys, steps = form.tiling.keys, jnp.where(offset < job.rows, job.steps, 0)
        whole = lax.div(job.length, keys)
        if form.causal and history:
            steps = jnp.minimum(steps, lax.div(begin + (TILE + keys - 1), keys))
            whole = jnp.minimum(whole, lax.div(begin, keys))
        whole = jnp.minimum(whole, steps)
        one = partial(_step_of, job, group, begin, factors, memory, barriers, form, history)
        state = lax.fori_loop(0, whole, one(False), state)
        state = lax.fori_loop(whole, steps, one(True), state)
        _pass_by(steps, job.steps, barriers, form)
        return state

    if form.timed or form.causal:
        state = lax.cond(job.is_history, partial(all_steps, True), partial(all_steps, False), state)
    else:
        state = all_steps(False, state)
    for i, (mixed, *running) in enumerate(state):
        inverse = per_row(1.0 / running[1], mixed) if form.softmax else 1.0 / form.divisor
        memory.own_v[group, i] = (mixed * inverse).astype(form.dtype)
    plgpu.commit_smem()
    _store(job, offset, memory.own_v.at[group], form)


def _pass_by(start: jax.Array, stop: jax.Array, barriers: _Barriers, form: Form) -> None:
    """Steps that only other warpgroups have a use for."""

    @pl.loop(start, stop)
    def _(step: jax.Array) -> None:
        slot = lax.rem(step, form.tiling.stages)
        plgpu.barrier_wait(barriers.k_ready.at[slot])  # or else it would be counted twice for the step before
        plgpu.barrier_arrive(barriers.consumed.at[slot])


def _load_own(job: _Job, group: jax.Array, alone: jax.Array, memory: Memory, barriers: _Barriers, form: Form) -> None:
    row = job.row + group * TILE
    ready, own = barriers.q_ready.at[group], pl.ds(row + form.first, TILE)
    for i in range(form.together):
        source = job.q.at[job.block, pl.ds(row, TILE), _columns(job, i, form.qk_dim)]
        plgpu.copy_gmem_to_smem(source, memory.q.at[group, i], ready)
    if form.timed:
        plgpu.copy_gmem_to_smem(job.time.at[job.block, :, own], memory.own_time.at[group], ready)

    @pl.when(alone)
    def _() -> None:
        ready = barriers.own_ready.at[group]
        for i in range(form.together):
            source = job.k.at[job.block, own, _columns(job, i, form.qk_dim)]
            plgpu.copy_gmem_to_smem(source, memory.own_k.at[group, i], ready)
            source = job.v.at[job.block, own, _columns(job, i, form.v_dim)]
            plgpu.copy_gmem_to_smem(source, memory.own_v.at[group, i], ready)


def _store(job: _Job, offset: jax.Array, result: Any, form: Form) -> None:
    """The rows that belong to the job: rows after them may be another request's."""
    piece = min(form.align, TILE)
    for at in range(0, TILE, piece):

        @pl.when(offset + at < job.rows)
        def _(at: int = at) -> None:
            to = pl.ds(job.row + offset + at, piece)
            for i in range(form.together):
                source = result.at[i, pl.ds(at, piece)]
                plgpu.copy_smem_to_gmem(source, job.out.at[job.block, to, _columns(job, i, form.v_dim)])

    plgpu.wait_smem_to_gmem(0)


def _factors(job: _Job, i: int, form: Form) -> list[Any]:
    """Of q . k and of the bias's three terms. Softmax counts in powers of 2."""
    if form.scale is not None:
        scale, unit = form.scale, 1.0
    else:
        scale = unit = math.log2(math.e) / job.temperature[job.block, job.scenario, job.head + i]
    if not form.biased:
        return [scale]
    return [scale, *(job.coefficients[job.block, job.scenario, job.head + i, c] * unit for c in range(3))]


def _step_of(
    job: _Job,
    group: jax.Array,
    begin: jax.Array,
    factors: list[list[Any]],
    memory: Memory,
    barriers: _Barriers,
    form: Form,
    history: bool,
    masked: bool,
) -> Callable[[jax.Array, Any], Any]:
    """Takes one step's keys in; masked where some may be hidden."""

    def step(number: jax.Array, state: Any) -> Any:
        slot, key = lax.rem(number, form.tiling.stages), number * form.tiling.keys
        plgpu.barrier_wait(barriers.k_ready.at[slot])
        scores = scores_of(memory.q.at[group], memory.k.at[slot], form)
        logs = None
        if form.biased and history:
            logs = pair_logs(begin - key, memory.own_time.at[group], memory.key_time.at[slot])
        elif form.biased:
            logs = known_logs(memory.key_log.at[slot])
        keys, causal = form.tiling.keys, form.causal and history
        hidden = hidden_pairs(job.length, begin, key, keys, causal) if masked else None
        logits = [logits_of(scores[i], factors[i], logs) for i in range(form.together)]
        weighted = [weigh(logits[i], hidden, state[i], form.dtype) for i in range(form.together)]
        plgpu.barrier_wait(barriers.v_ready.at[slot])
        mixed = mix(weighted, memory.v.at[slot], memory.weights.at[group] if form.interpret else None)
        plgpu.barrier_arrive(barriers.consumed.at[slot])
        return tuple((new, *running) for new, (_, _, *running) in zip(mixed, weighted, strict=True))

    return step
