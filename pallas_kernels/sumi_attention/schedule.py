"""The list of query tiles that a fused kernel works off, derived on the device from the request rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flame_jax.packing import (
    CANDIDATE_COUNT,
    CANDIDATE_START,
    HISTORY_LENGTH,
    HISTORY_START,
    REQUEST_TIME,
    SCENARIO,
)
from flame_jax.pallas_kernels.segments import longest, per_row, tiles

# Columns of a job. One history length per block follows.
FIRST_ROW, ROWS, KEY_START, POSITION, IS_HISTORY, JOB_SCENARIO, JOB_REQUEST, JOB_LENGTH = range(8)

FEW = 32
"""Jobs whose thread blocks a GPU runs all at once, whatever they are multiplied with."""


def jobs(rows: jax.Array, *, align: int, first: int, last: int, size: int) -> jax.Array:
    """Cut the token rows [first, last) into tiles of at most `size` rows that never belong to two requests.

    Every row belongs to exactly one job: the rows between histories and candidates, which no request owns, come as
    candidates without a history, so that a kernel writes something finite there.

    Args:
        rows: int32[R, 5 + blocks], the request rows of the packed layout in the order of `packing.place`; an unused row
            holds zeros. Where histories lie in pages, those of `segments.histories_elsewhere`: then all jobs are of
            candidates.
        align: the layout's alignment; `first`, `last` and `size` are multiples of it.

    Returns:
        int32[jobs, 7 + blocks]: first row, counted from `first`; rows, 0 for an unused job; first key row of the
        request; position of the first row in its history; whether it lies in the history; scenario; the request's
        number; keys per block.
    """
    lengths = list(rows[:, HISTORY_LENGTH:].T)
    begin, candidates = rows[:, HISTORY_START], rows[:, CANDIDATE_START]
    end = begin + _aligned(longest(rows), align)
    each = jnp.arange(len(rows), dtype=jnp.int32)
    # Nobody's rows follow the last history: what is free after any other is nothing.
    following = jnp.pad(rows[1:], ((0, 1), (0, 0)))
    free = jnp.where(rows[:, CANDIDATE_COUNT] > 0, candidates, jnp.where(each == 0, last, 0))
    free = jnp.where(following[:, CANDIDATE_COUNT] > 0, following[:, HISTORY_START], free)
    starts = [jnp.maximum(start, first) for start in (begin, candidates, end)]
    ends = [end, candidates + _aligned(rows[:, CANDIDATE_COUNT], align), free]

    # Few jobs are numbered by their rows instead of one after another: unused thread blocks between others cost nothing
    # where all run at once, and a kernel is saved.
    number = jnp.arange(limit(last - first, len(rows), align, size), dtype=jnp.int32)[:, None]
    if len(number) == (last - first) // align <= FEW:
        unit, before = align, [(start - first) // align for start in starts]
    else:
        unit, before = size, _before([-(-(end - start) // size) for start, end in zip(starts, ends, strict=True)])

    # All pairs of jobs and parts are few: a sum over them is one small kernel, where a gather is two.
    def part(kind: int, key_start: jax.Array, *more: jax.Array) -> jax.Array:
        """int32[jobs, columns, R] of histories (0), candidates (1) or nobody's rows (2): zeros for jobs of others."""
        start, count, offset = starts[kind], ends[kind] - starts[kind], (number - before[kind]) * unit
        own, row = (offset >= 0) & (offset < count) & (offset % size == 0), start + offset
        columns = [row - first, jnp.minimum(count - offset, size), key_start, row - key_start, *more]
        return jnp.stack([jnp.where(own, column, 0) for column in columns], axis=1)

    zeros, request = jnp.zeros_like(each), (rows[:, SCENARIO], each, *lengths)
    histories = part(0, begin, zeros + 1, *request)
    return (histories + part(1, begin, zeros, *request) + part(2, *[zeros] * (len(request) + 2))).sum(axis=-1)


def _before(counts: list[jax.Array]) -> list[jax.Array]:
    """What all numbers before each of these add up to; negative ones count as 0."""
    flat = jnp.maximum(jnp.concatenate(counts), 0)
    return jnp.split(jnp.where(jnp.tri(len(flat), k=-1, dtype=bool), flat, 0).sum(axis=1), len(counts))


def limit(rows: int, requests: int, align: int, size: int) -> int:
    """Jobs that `rows` token rows of at most so many requests need at most: each part may end in a partial one."""
    return min(rows // align, rows // size + 2 * requests + 1)


def key_logs(rows: jax.Array, time: jax.Array, *, align: int) -> jax.Array:
    """What a candidate's `LogBias` reads of every history row, which is the same for all candidates of a request.

    Args:
        time: int32[blocks, T].

    Returns:
        float32[blocks, 2, T]: log2(1 + |dp|) and log2(1 + |dt|) between a request's candidates and its history rows.
    """
    tokens = time.shape[1]
    start = jnp.arange(0, tokens, align, dtype=jnp.int32)
    lengths = rows[:, HISTORY_LENGTH:]
    offset = start[:, None] - rows[None, :, HISTORY_START]
    request = jnp.argmax((offset >= 0) & (offset < longest(rows)), axis=1)

    position = jnp.arange(tokens, dtype=jnp.int32) - per_row(rows[request, HISTORY_START], align)
    ahead = per_row(lengths[request], align).T - position
    age = per_row(rows[request, REQUEST_TIME], align) - time
    return _logs(ahead, age)


def page_logs(rows: jax.Array, table: jax.Array, time: jax.Array) -> jax.Array:
    """`key_logs` of histories in pages, request by request: two of them may share a page, and see it from other times.

    Args:
        table: int32[R, max_pages].
        time: int32[blocks, pages, page_rows].

    Returns:
        float32[blocks, 2, R * max_pages * page_rows].
    """
    own = time[:, table].reshape(len(time), len(rows), -1)
    ahead = rows[:, HISTORY_LENGTH:].T[:, :, None] - jnp.arange(own.shape[2], dtype=jnp.int32)
    logs = _logs(ahead, rows[:, REQUEST_TIME, None] - own)
    return logs.reshape(*logs.shape[:2], -1)


def _logs(ahead: jax.Array, age: jax.Array) -> jax.Array:
    """float32[blocks, 2, ...] of int32[blocks, ...]."""
    return jnp.log2(1.0 + jnp.abs(jnp.stack([ahead, age], axis=1)).astype(jnp.float32))


def pair_logs(rows: jax.Array, time: jax.Array, *, align: int, window: int) -> jax.Array:
    """What `LogBias` reads of every pair of history rows, for kernels that read it more than once.

    Args:
        time: int32[blocks, T].
        window: keys from the first one of a row's request on.

    Returns:
        float16[2, blocks, T, window]: log2(1 + |dp|) and log2(1 + |dt|), to 11 bits. For rows and keys that are not of
        one history they are finite and mean nothing.
    """
    blocks, length = time.shape
    start = tiles(rows, align=align, first=0, last=length).history_start
    key = jnp.arange(window, dtype=jnp.int32)
    row = jnp.arange(length, dtype=jnp.int32).reshape(-1, align) - start[:, None]
    far = jnp.broadcast_to((row[:, :, None] - key)[None], (blocks, *row.shape, window))
    then = time[:, jnp.minimum(start[:, None] + key, length - 1)]
    old = time.reshape(blocks, -1, align)[..., None] - then[:, :, None]
    distance = jnp.maximum(jnp.abs(jnp.stack([far, old])), 0)  # of times that no request has sent it may overflow
    logs = jnp.log2(1.0 + distance.astype(jnp.float32))
    return logs.astype(jnp.float16).reshape(2, blocks, length, window)


def time_parts(time: jax.Array) -> jax.Array:
    """Times in two float32 parts, of which differences add up to that of the times, rounded once.

    Args:
        time: int32[blocks, T].

    Returns:
        float32[blocks, 2, T]: a multiple of 4096 seconds, and the rest.
    """
    rest = time & 4095
    return jnp.stack([time - rest, rest], axis=1).astype(jnp.float32)


def _aligned(count: jax.Array, align: int) -> jax.Array:
    return -(-count // align) * align
