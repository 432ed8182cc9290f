"""SUMI attention in float64 NumPy, a request at a time: nothing of the kernels' packing, tiling or arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flame_jax.packing import CANDIDATE_COUNT, CANDIDATE_START, HISTORY_LENGTH, HISTORY_START, REQUEST_TIME, SCENARIO


class Form(NamedTuple):
    """An attention: softmax with a temperature, or SiLU with a scale and a divisor; a log bias, tables, or neither.

    Attributes:
        temperature: [blocks, scenarios, heads], or None.
        coefficients: [blocks, scenarios, heads, 3], or None.
        tables: by position and by time, see `TableBias`, or None.
    """

    temperature: np.ndarray | None
    scale: float
    divisor: float
    coefficients: np.ndarray | None
    causal: bool
    tables: tuple[np.ndarray, np.ndarray] | None = None


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, row: np.ndarray, time: np.ndarray, block: int, head: int, form: Form
) -> tuple[np.ndarray, np.ndarray]:
    """One request's rows of one block and head.

    Args:
        q, k, v: float64[T, dim] of that block and head.
        row: its request row.
        time: int64[T] of that block.

    Returns:
        Token rows, history first, and their outputs.
    """
    n, count, scenario = int(row[HISTORY_LENGTH + block]), int(row[CANDIDATE_COUNT]), int(row[SCENARIO])
    history = row[HISTORY_START] + np.arange(n)
    candidates = row[CANDIDATE_START] + np.arange(count)
    at = np.concatenate([history, candidates])
    position = np.concatenate([np.arange(n), np.full(count, n)])
    when = np.concatenate([time[history], np.full(count, row[REQUEST_TIME], np.int64)])
    scores, own = q[at] @ k[history].T, (q[candidates] * k[candidates]).sum(axis=1)
    unit = form.scale if form.temperature is None else 1.0
    scores, own = scores * unit, own * unit
    if form.coefficients is not None:
        alpha, beta, gamma = form.coefficients[block, scenario, head]
        far = np.log2(1.0 + np.abs(position[:, None] - np.arange(n)))
        old = np.log2(1.0 + np.abs(when[:, None] - time[history]))
        scores = scores + alpha * far + beta * old + gamma
    if form.tables is not None:
        by_position, by_time = form.tables
        last = len(by_position) // 2
        behind = np.clip(position[:, None] - np.arange(n), -last, last)
        counted = np.concatenate([when[1:n], when[n - 1 : n], when[n:]])  # from the successor's time
        scores = scores + by_position[behind + last] + by_time[_bucket(counted[:, None] - time[history], by_time)]
        own = own + by_position[last] + by_time[0]
    seen = np.ones_like(scores, bool)
    if form.causal:
        seen[:n] = np.arange(n) <= np.arange(n)[:, None]
    if form.temperature is None:
        weights, own = np.where(seen, _silu(scores), 0.0) / form.divisor, _silu(own) / form.divisor
    else:
        tau = form.temperature[block, scenario, head]
        weights, own = _softmax(np.where(seen, scores, -np.inf) / tau, own / tau, n)
    out = weights @ v[history]
    out[n:] += own[:, None] * v[candidates]
    return at, out


def _bucket(difference: np.ndarray, table: np.ndarray) -> np.ndarray:
    bucket = np.floor(np.log(np.maximum(np.abs(difference), 1)) / 0.301)
    return np.asarray(np.minimum(bucket, len(table) - 1).astype(int))


def _silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1.0 + np.exp(-x)))


def _softmax(logits: np.ndarray, own: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows from `n` on have one more logit, their own key's."""
    every = np.concatenate([logits, np.full((len(logits), 1), -np.inf)], axis=1)
    every[n:, -1] = own
    weights = np.exp(every - every.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights[:, :-1], weights[n:, -1]
