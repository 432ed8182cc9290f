"""Float64 NumPy reference of the three HSTU variants, written from docs/models.md alone; clear, not fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flame_jax.schema import FeatureSchema
from tests.oracles.climber import Array, OracleRequest, candidate_tokens, sigmoid
from tests.oracles.head import as_float64, history_rows, layer_norm, logits, position_row

Bias = Callable[[int, int], float]
"""(query row m, key row j) -> what is added to the scaled product."""

FINAL_EPS = 1e-6
BUCKET_WIDTH = 0.301
LAYER_EPS = {"dlrm_v3": 1e-6, "recsys_examples": 1e-5, "research": 1e-6}


@dataclass(frozen=True)
class Settings:
    """What the weights' shapes do not say.

    Attributes:
        variant: which of the three layers.
        heads: heads per layer, H.
        dqk: query and key size of a head.
        dv: value size of a head.
        divisor: N, by which every attention weight is divided.
        interleave: an event takes two rows, its item and then its action.
        bias_positions: P of `layers/pos` (`research` only).
    """

    variant: Literal["dlrm_v3", "recsys_examples", "research"]
    heads: int
    dqk: int
    dv: int
    divisor: float
    interleave: bool = False
    bias_positions: int = 0


def rank(params: dict[str, NDArray[Any]], schema: FeatureSchema, request: OracleRequest, settings: Settings) -> Array:
    """Probabilities [C, tasks] of the request's candidates."""
    weights = as_float64(params)
    if len(request.blocks) != 1 or len(schema.blocks) != 1:
        raise ValueError(f"HSTU reads one block; request has {len(request.blocks)}, schema {len(schema.blocks)}")
    items, actions, times = request.blocks[0]
    rows, row_times = history_rows(weights, items, actions, times, interleave=settings.interleave)
    n = len(rows)
    x = np.concatenate([rows, candidate_tokens(weights, schema, request)])
    x = encode(weights, x, times=row_times, request_time=request.request_time)
    time_array = np.array(row_times, dtype=np.int64)
    x = stack(params, x, settings=settings, times=time_array, request_time=request.request_time, history=n)
    answer = np.zeros((len(request.candidates), len(schema.tasks)))
    for i, item in enumerate(request.candidates):
        y = layer_norm(x[n + i], FINAL_EPS, weights["final_scale"], weights["final_shift"])
        answer[i] = sigmoid(logits(params, y, int(item)))
    return answer


# Input encoding


def encode(weights: dict[str, Array], x: Array, *, times: Sequence[int], request_time: int) -> Array:
    """Input encoding of x [n + C, D], whose first rows are as many history rows as there are times."""
    if "position" not in weights and "time" not in weights:
        return x
    n = len(times)
    out = np.zeros_like(x)
    for m in range(len(x)):
        out[m] = x[m] * math.sqrt(x.shape[1])
        if "position" in weights:
            out[m] += weights["position"][position_row(m, n, len(weights["position"]))]
        if "time" in weights:
            age = int(request_time) - int(times[m]) if m < n else 0
            out[m] += weights["time"][age_bucket(age, len(weights["time"]))]
    return out


def age_bucket(age: int, rows: int) -> int:
    """min(floor(sqrt(max(age, 0) / 60)), rows - 1), exactly: floor(sqrt(z)) = isqrt(floor(z))."""
    return min(math.isqrt(max(int(age), 0) // 60), rows - 1)


# Layers


def stack(
    params: dict[str, NDArray[Any]],
    x: NDArray[Any],
    *,
    settings: Settings,
    times: NDArray[Any],
    request_time: int,
    history: int,
) -> Array:
    """The layers alone over x [n + C, D]: `history` = n rows, oldest first, with their times [n], then candidates."""
    if len(times) != history:
        raise ValueError(f"{len(times)} times for a history of {history} rows")
    weights = as_float64(params)
    x = np.asarray(x, dtype=np.float64)
    # Python integers, so that differences of times cannot wrap around.
    row_times = [int(t) for t in times]
    for number in range(weights["layers/uvqk_w"].shape[0]):
        own = {name.removeprefix("layers/"): w[number] for name, w in weights.items() if name.startswith("layers/")}
        x = layer(own, x, settings=settings, times=row_times, request_time=int(request_time))
    return x


def layer(own: dict[str, Array], x: Array, *, settings: Settings, times: Sequence[int], request_time: int) -> Array:
    """One layer with its own weights (names without prefix) over x [n + C, D] -> [n + C, D]."""
    H, dqk, dv, n = settings.heads, settings.dqk, settings.dv, len(times)
    eps = LAYER_EPS[settings.variant]
    research = settings.variant == "research"

    u = np.zeros((len(x), H * dv))
    v = np.zeros((len(x), H * dv))
    q = np.zeros((len(x), H * dqk))
    k = np.zeros((len(x), H * dqk))
    for m in range(len(x)):
        if research:
            uvqk = silu(layer_norm(x[m], eps) @ own["uvqk_w"])
        else:
            uvqk = layer_norm(x[m], eps, own["input_scale"], own["input_shift"]) @ own["uvqk_w"] + own["uvqk_b"]
            if settings.variant == "recsys_examples":
                uvqk = silu(uvqk)
        u[m], v[m], q[m], k[m] = split(uvqk, [H * dv, H * dv, H * dqk, H * dqk])
        if settings.variant == "dlrm_v3":
            u[m] = silu(u[m])

    bias = research_bias(own, settings, times, request_time) if research else None
    o = np.zeros((len(x), H * dv))
    for head in range(H):
        qk_columns = slice(head * dqk, (head + 1) * dqk)
        v_columns = slice(head * dv, (head + 1) * dv)
        o[:, v_columns] = attention(
            q[:, qk_columns],
            k[:, qk_columns],
            v[:, v_columns],
            history=n,
            scale=1.0 if research else 1.0 / math.sqrt(dqk),
            divisor=settings.divisor,
            bias=bias,
        )

    y = np.zeros_like(x)
    for m in range(len(x)):
        if settings.variant == "dlrm_v3":
            gated = u[m] * layer_norm(o[m], eps, own["output_scale"], own["output_shift"])
            y[m] = x[m] + np.concatenate([u[m], o[m], gated]) @ own["out_w"]
        elif settings.variant == "recsys_examples":
            gated = u[m] * layer_norm(o[m], eps, own["output_scale"], own["output_shift"])
            y[m] = x[m] + gated @ own["out_w"]
        else:
            gated = u[m] * layer_norm(o[m], eps)
            y[m] = x[m] + gated @ own["out_w"] + own["out_b"]
    return y


def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    history: int,
    scale: float,
    divisor: float,
    bias: Bias | None = None,
) -> Array:
    """One head: q, k [n + C, dqk], v [n + C, dv], history rows first -> o [n + C, dv]."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for m in range(len(q)):
        seen = range(m + 1) if m < history else [*range(history), m]
        for j in seen:
            score = float(q[m] @ k[j]) * scale
            if bias is not None:
                score += bias(m, j)
            out[m] += float(silu(np.array(score))) / divisor * v[j]
    return out


def research_bias(own: dict[str, Array], settings: Settings, times: Sequence[int], request_time: int) -> Bias:
    """Position and time bias of one layer of `research`; it holds for a candidate's own key as well."""
    P, n = settings.bias_positions, len(times)
    if own["pos"].shape != (2 * P - 1,):
        raise ValueError(f"pos has shape {own['pos'].shape}, not 2 * {P} - 1")

    def bias(m: int, j: int) -> float:
        query_position, key_position = min(m, n), min(j, n)  # every candidate stands at n
        # A history row is asked at the time of the next row, the newest at its own; a candidate at the request time.
        query_time = times[min(m + 1, n - 1)] if m < n else request_time
        key_time = times[j] if j < n else request_time
        return float(
            own["pos"][relative_row(query_position - key_position, P)]
            + own["ts"][gap_bucket(query_time - key_time, len(own["ts"]))]
        )

    return bias


def relative_row(difference: int, positions: int) -> int:
    """clip(difference) + P - 1, clip to [-(P - 1), P - 1]."""
    return max(-(positions - 1), min(difference, positions - 1)) + positions - 1


def gap_bucket(difference: int, rows: int) -> int:
    """min(floor(ln(max(|d|, 1)) / 0.301), rows - 1); the floor is right at least to |d| = 2^32."""
    return min(math.floor(math.log(max(abs(int(difference)), 1)) / BUCKET_WIDTH), rows - 1)


def split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """Consecutive parts of one vector [sum(sizes)]."""
    if len(x) != sum(sizes):
        raise ValueError(f"{len(x)} numbers cannot be split into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def silu(x: Array) -> Array:
    """x * sigmoid(x), elementwise."""
    return x * sigmoid(x)
