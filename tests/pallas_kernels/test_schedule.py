"""The list of query tiles: every row in one job, and each job what its request's row says."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import Bucket, Extent, Layout, place
from flame_jax.pallas_kernels.segments import histories_elsewhere
from flame_jax.pallas_kernels.sumi_attention import schedule
from flame_jax.pallas_kernels.sumi_attention.schedule import jobs, key_logs, page_logs

BLOCKS = 2
extents = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), max_size=5)


def table(
    shapes: list[tuple[int, int]], align: int, slack: tuple[int, int], random: np.random.Generator
) -> tuple[np.ndarray, Bucket]:
    """Request rows for these histories and candidates, in a bucket with some room left."""
    layout = Layout(align=align, max_requests=8)
    pieces = [Extent(*shape) for shape in shapes]
    aligned = [layout.aligned_extent(piece) for piece in pieces]
    candidates = sum(a.candidates for a in aligned) + slack[0] * align
    bucket = Bucket(sum(a.history for a in aligned) + candidates + slack[1] * align, candidates)
    rows = np.zeros((layout.max_requests, 5 + BLOCKS), np.int32)
    for number, (piece, where) in enumerate(zip(pieces, place(pieces, bucket, layout), strict=True)):
        lengths = [piece.history, int(random.integers(0, piece.history + 1))]
        rows[number] = (
            where.history_start,
            where.candidate_start,
            piece.candidates,
            number % 3,
            1000 + number,
            *lengths,
        )
    return rows, bucket


def without_histories(rows: np.ndarray, bucket: Bucket, align: int) -> tuple[np.ndarray, Bucket]:
    """The same requests' candidates alone, with histories in pages."""
    rows = rows.copy()
    rows[:, 0] = 0
    rows[rows[:, 2] > 0, 1] -= bucket.tokens - bucket.candidates
    return np.asarray(histories_elsewhere(jnp.asarray(rows), align)), Bucket(*[bucket.candidates] * 2)


@settings(max_examples=18)
@given(
    shapes=extents,
    align=st.sampled_from([16, 64]),
    warpgroups=st.integers(1, 3),
    slack=st.tuples(st.integers(1, 4), st.integers(0, 4)),
    queries=st.sampled_from(["all", "candidates", "candidates of pages"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_belongs_to_the_one_job_that_its_request_says(
    shapes: list[tuple[int, int]], align: int, warpgroups: int, slack: tuple[int, int], queries: str, seed: int
) -> None:
    rows, bucket = table(shapes, align, slack, np.random.default_rng(seed))
    if queries == "candidates of pages":
        rows, bucket = without_histories(rows, bucket, align)
    first, size = (0 if queries == "all" else bucket.tokens - bucket.candidates), 64 * warpgroups
    found = np.asarray(jobs(jnp.asarray(rows), align=align, first=first, last=bucket.tokens, size=size))
    owner = np.full(bucket.tokens, -1)
    for number, (start, count, *_) in enumerate(found):
        assert 0 <= count <= size
        at = slice(first + start, first + start + count)
        assert (owner[at] == -1).all()
        owner[at] = number
    assert (owner[first:] >= 0).all()
    layout = Layout(align=align, max_requests=len(rows))
    for number, row in enumerate(rows[: len(shapes)]):
        history, candidates, count, scenario, _, *lengths = row.tolist()
        parts = [(history, layout.aligned(max(lengths)), 1), (candidates, layout.aligned(count), 0)]
        for begin, length, is_history in parts:
            for token in range(max(begin, first), begin + length):
                job = found[owner[token]].tolist()
                position = job[schedule.POSITION] + token - first - job[schedule.FIRST_ROW]
                assert position == token - history
                assert job[schedule.KEY_START] == history
                assert job[schedule.IS_HISTORY : schedule.JOB_LENGTH] == [is_history, scenario, number]
                assert job[schedule.JOB_LENGTH :] == lengths
    used = {n for row in rows for n in _owners(owner, row, layout, first)}
    for number in set(owner[first:].tolist()) - used:  # rows between histories and candidates
        assert found[number, schedule.IS_HISTORY] == 0
        assert found[number, schedule.JOB_LENGTH :].tolist() == [0] * BLOCKS


def _owners(owner: np.ndarray, row: np.ndarray, layout: Layout, first: int) -> set[int]:
    history, candidates, count, _, _, *lengths = row.tolist()
    parts = [(history, layout.aligned(max(lengths))), (candidates, layout.aligned(count))] if count else []
    return {int(n) for start, rows in parts for n in owner[max(start, first) : start + rows]}


@pytest.mark.parametrize("requests", [1, 32, 64])
def test_the_list_is_as_long_as_the_worst_batch_needs(requests: int) -> None:
    random = np.random.default_rng(requests)
    worst = [(16, 16)] * min(requests, 8)
    rows, bucket = table(worst, 16, (1, 1), random)
    found = np.asarray(jobs(jnp.asarray(rows), align=16, first=0, last=bucket.tokens, size=128))
    assert (found[:, schedule.ROWS] > 0).sum() == 2 * len(worst) + 1
    assert len(found) == schedule.limit(bucket.tokens, len(rows), 16, 128) >= 2 * len(worst) + 1


def test_what_candidates_read_of_the_history() -> None:
    rows, bucket = table([(70, 3), (40, 20)], 16, (1, 1), np.random.default_rng(0))
    time = np.random.default_rng(1).integers(0, 2**31 - 1, (BLOCKS, bucket.tokens)).astype(np.int32)
    found = np.asarray(key_logs(jnp.asarray(rows), jnp.asarray(time), align=16))
    for history, _, count, _, request_time, *lengths in rows.tolist():
        for block, length in enumerate(lengths if count else []):
            for position in range(length):
                far, old = found[block, :, history + position]
                assert far == pytest.approx(math.log2(1 + length - position), rel=1e-6)
                age = abs(request_time - int(time[block, history + position]))
                assert old == pytest.approx(math.log2(1 + age), rel=1e-6)


def test_what_candidates_read_of_a_history_in_pages() -> None:
    random = np.random.default_rng(2)
    rows, _ = table([(70, 3), (40, 20), (0, 1)], 16, (1, 1), random)
    pages, time = random.integers(0, 4, (len(rows), 2)), random.integers(0, 2**31 - 1, (BLOCKS, 4, 64))
    found = np.asarray(page_logs(*(jnp.asarray(x, jnp.int32) for x in (rows, pages, time))))
    assert found.shape == (BLOCKS, 2, len(rows) * 128)
    for number, (*_, request_time, first, second) in enumerate(rows.tolist()):
        for block, length in enumerate((first, second)):
            for position in range(length):
                far, old = found[block, :, 128 * number + position]
                age = abs(request_time - int(time[block, pages[number, position // 64], position % 64]))
                assert (far, old) == pytest.approx((math.log2(1 + length - position), math.log2(1 + age)), rel=1e-6)
