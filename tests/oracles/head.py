"""Float64 reference of what every ranker shares: history rows, reversed positions and the expert head (docs/models.md).

Clear, not fast.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracles.climber import Array, history_tokens, relu


def logits(params: dict[str, NDArray[Any]], y: NDArray[Any], item_row: int) -> Array:
    """Logits [tasks] of one candidate, from the m numbers y [m] of its model and its row of the item table."""
    weights = as_float64(params)
    y = np.asarray(y, dtype=np.float64)
    experts = [
        relu(y @ w + b) for w, b in zip(weights["head/expert_w"], weights["head/expert_b"], strict=True)
    ]  # M times [expert_hidden]
    tasks = weights["head/mix_w"].shape[0]
    answer = np.zeros(tasks)
    for t in range(tasks):
        shares = softmax(y @ weights["head/mix_w"][t] + weights["head/mix_b"][t])  # [M]
        mixture = np.zeros_like(experts[0])
        for share, expert in zip(shares, experts, strict=True):
            mixture = mixture + share * expert
        hidden = relu(mixture @ weights["head/tower_w"][t] + weights["head/tower_b"][t])  # [tower_hidden]
        answer[t] = (
            hidden @ weights["head/logit_w"][t] + weights["head/logit_b"][t] + weights["item_bias"][int(item_row), t]
        )
    return answer


def history_rows(
    weights: dict[str, Array], items: NDArray[Any], actions: NDArray[Any], times: NDArray[Any], *, interleave: bool
) -> tuple[Array, list[int]]:
    """Rows [n, D] of the history and the time of each: a row per event, or (interleave) its item, then its action."""
    if not len(items) == len(actions) == len(times):
        raise ValueError(f"{len(items)} items, {len(actions)} actions and {len(times)} times")
    if not interleave:
        return history_tokens(weights, items, actions), [int(t) for t in times]
    rows = np.zeros((2 * len(items), weights["item"].shape[1]))
    row_times: list[int] = []
    for j, (item, action, time) in enumerate(zip(items, actions, times, strict=True)):
        rows[2 * j] = weights["item"][int(item)]
        rows[2 * j + 1] = weights["action"][int(action)]
        row_times += [int(time), int(time)]
    return rows, row_times


def position_row(row: int, history: int, table_rows: int) -> int:
    """Row of a table of reversed positions that row `row` reads (history rows first, then candidates)."""
    reversed_position = history - row if row < history else 0
    return min(reversed_position, table_rows - 1)


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) of one vector [M]."""
    unnormalised = np.asarray(np.exp(x - np.max(x)), dtype=np.float64)
    return unnormalised / float(np.sum(unnormalised))


def layer_norm(x: Array, eps: float, scale: Array | None = None, shift: Array | None = None) -> Array:
    """LN of one vector [d], population variance; without scale and shift where a norm has no weights."""
    mean = float(np.mean(x))
    variance = float(np.mean((x - mean) ** 2))
    normed = (x - mean) / math.sqrt(variance + eps)
    if scale is not None:
        normed = normed * scale
    return normed if shift is None else normed + shift


def as_float64(params: dict[str, NDArray[Any]]) -> dict[str, Array]:
    """The same weights in float64."""
    return {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
