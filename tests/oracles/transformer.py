"""Float64 NumPy reference of the plain transformer baseline, written from docs/models.md alone; clear, not fast."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_jax.schema import FeatureSchema
from tests.oracles.climber import Array, OracleRequest, attend, candidate_tokens, sigmoid, split_heads
from tests.oracles.head import as_float64, history_rows, layer_norm, logits, position_row

EPS = 1e-6


def rank(
    params: dict[str, NDArray[Any]],
    schema: FeatureSchema,
    request: OracleRequest,
    *,
    heads: int,
    head_dim: int,
    interleave: bool = False,
) -> Array:
    """Probabilities [C, tasks] of the request's candidates."""
    weights = as_float64(params)
    if len(request.blocks) != 1 or len(schema.blocks) != 1:
        raise ValueError(
            f"the transformer reads one block; request has {len(request.blocks)}, schema {len(schema.blocks)}"
        )
    items, actions, times = request.blocks[0]
    rows, _ = history_rows(weights, items, actions, times, interleave=interleave)
    n = len(rows)
    x = add_positions(weights, np.concatenate([rows, candidate_tokens(weights, schema, request)]), history=n)
    x = stack(params, x, heads=heads, head_dim=head_dim, history=n)
    answer = np.zeros((len(request.candidates), len(schema.tasks)))
    for i, item in enumerate(request.candidates):
        y = layer_norm(x[n + i], EPS, weights["final_scale"], weights["final_shift"])
        answer[i] = sigmoid(logits(params, y, int(item)))
    return answer


def add_positions(weights: dict[str, Array], x: Array, *, history: int) -> Array:
    """x [n + C, D] plus the row of E_pos of each reversed position; x itself where there is no such table."""
    if "position" not in weights:
        return x
    out = np.zeros_like(x)
    for m in range(len(x)):
        out[m] = x[m] + weights["position"][position_row(m, history, len(weights["position"]))]
    return out


def stack(params: dict[str, NDArray[Any]], x: NDArray[Any], *, heads: int, head_dim: int, history: int) -> Array:
    """The layers alone over x [n + C, D]: `history` = n rows, oldest first, then candidates."""
    weights = as_float64(params)
    x = np.asarray(x, dtype=np.float64)
    for number in range(weights["layers/qkv_w"].shape[0]):
        own = {name.removeprefix("layers/"): w[number] for name, w in weights.items() if name.startswith("layers/")}
        x = layer(own, x, heads=heads, head_dim=head_dim, history=history)
    return x


def layer(own: dict[str, Array], x: Array, *, heads: int, head_dim: int, history: int) -> Array:
    """One layer with its own weights (names without prefix) over x [n + C, D] -> [n + C, D]."""
    h = np.zeros_like(x)
    for m in range(len(x)):
        h[m] = layer_norm(x[m], EPS, own["norm1_scale"], own["norm1_shift"])
    q, k, v = split_heads(h @ own["qkv_w"] + own["qkv_b"], heads=heads, head_dim=head_dim)
    o = np.concatenate([attention(q[head], k[head], v[head], history=history) for head in range(heads)], axis=1)
    y = np.zeros_like(x)
    for m in range(len(x)):
        middle = x[m] + o[m] @ own["out_w"] + own["out_b"]
        normed = layer_norm(middle, EPS, own["norm2_scale"], own["norm2_shift"])
        y[m] = middle + gelu(normed @ own["ffn1_w"] + own["ffn1_b"]) @ own["ffn2_w"] + own["ffn2_b"]
    return y


def attention(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, history: int) -> Array:
    """One head: q, k, v [n + C, head_dim], history rows first -> [n + C, head_dim].

    A history row sees the whole history, newer rows included; a candidate the whole history and itself.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for m in range(len(q)):
        seen = list(range(history)) if m < history else [*range(history), m]
        out[m] = attend([float(q[m] @ k[j]) / math.sqrt(q.shape[1]) for j in seen], [v[j] for j in seen])
    return out


def gelu(x: Array) -> Array:
    """x * Phi(x) with Phi the standard normal distribution function, elementwise, of a vector."""
    return np.array([value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x], dtype=np.float64)
