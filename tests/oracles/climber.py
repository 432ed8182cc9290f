"""Float64 NumPy reference of 'Climber (reconstruction)', written from docs/models.md alone; clear, not fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_jax.schema import Feature, FeatureSchema

Array = NDArray[np.float64]
Attention = Callable[[int, Array, Array, Array], Array]
"""(head, q [n, h], k [n, h], v [n, h]) -> [n, h]."""

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class OracleRequest:
    """One request, after extraction.

    Attributes:
        blocks: per block its item rows, actions and times (int [n_b] each), oldest first, possibly empty. They are
            taken as given: the strategy, `block_length` and the request time are not applied to them again.
        request_time: integer seconds.
        scenario: index into the schema's scenarios.
        candidates: item rows, int [C].
        item_features: name -> [C].
        user_features: name -> value.
        context_features: name -> value.
    """

    blocks: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]
    request_time: int
    scenario: int
    candidates: NDArray[Any]
    item_features: dict[str, NDArray[Any]]
    user_features: dict[str, float | int]
    context_features: dict[str, float | int]


def rank(
    params: dict[str, NDArray[Any]], schema: FeatureSchema, request: OracleRequest, *, heads: int, head_dim: int
) -> Array:
    """Probabilities [C, tasks] of the request's candidates."""
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    if len(request.blocks) != len(schema.blocks):
        raise ValueError(f"request has {len(request.blocks)} blocks, schema {len(schema.blocks)}")
    candidates = candidate_tokens(weights, schema, request)
    outputs = [
        run_block(weights, request, b, candidates, heads=heads, head_dim=head_dim) for b in range(len(schema.blocks))
    ]
    from tests.oracles.head import logits as head_logits  # it builds on this module

    answer = np.zeros((len(request.candidates), len(schema.tasks)))
    for i, item in enumerate(request.candidates):
        fused = fuse(weights, np.stack([z[i] for z in outputs]), request.scenario, heads=heads, head_dim=head_dim)
        gated = gate(weights, fused.reshape(-1))
        answer[i] = sigmoid(head_logits(weights, gated, int(item)))
    return answer


# Tokens


def embed_feature(table: Array, feature: Feature, value: float) -> Array:
    """F_f(value): [d] from a table [size, d] (numeric: [1, d])."""
    if feature.kind == "numeric":
        return np.array(float(value) * table[0])
    if feature.kind in ("categorical", "id"):
        return np.array(table[int(value)])
    total = np.zeros(table.shape[1])
    for bit in range(feature.size):
        if (int(value) >> bit) & 1:
            total += table[bit]
    return total


def candidate_tokens(weights: dict[str, Array], schema: FeatureSchema, request: OracleRequest) -> Array:
    """[C, d]: item, the 'candidate' action, and every side feature."""
    stands_for_candidate = weights["action"][schema.actions]
    tokens = np.zeros((len(request.candidates), weights["item"].shape[1]))
    for i, item in enumerate(request.candidates):
        token = weights["item"][int(item)] + stands_for_candidate
        for f in schema.item_features:
            value = request.item_features[f.name][i]
            if f.source == "table":
                value = weights[f"columns/item.{f.name}"][int(item)]
            token = token + embed_feature(weights[f"features/item.{f.name}"], f, value)
        for f in schema.user_features:
            token = token + embed_feature(weights[f"features/user.{f.name}"], f, request.user_features[f.name])
        for f in schema.context_features:
            token = token + embed_feature(weights[f"features/context.{f.name}"], f, request.context_features[f.name])
        tokens[i] = token
    return tokens


def history_tokens(weights: dict[str, Array], items: NDArray[Any], actions: NDArray[Any]) -> Array:
    """[n, d]: item plus action."""
    tokens = np.zeros((len(items), weights["item"].shape[1]))
    for j, (item, action) in enumerate(zip(items, actions, strict=True)):
        tokens[j] = weights["item"][int(item)] + weights["action"][int(action)]
    return tokens


# Attention


def attend(logits: list[float], values: list[Array]) -> Array:
    """softmax(logits) . values: [h] from as many logits as values [h]."""
    largest = max(logits)
    unnormalised = [math.exp(logit - largest) for logit in logits]
    total = sum(unnormalised)
    out = np.zeros_like(values[0])
    for weight, value in zip(unnormalised, values, strict=True):
        out = out + (weight / total) * value
    return out


def sumi_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    history_length: int,
    history_times: NDArray[Any],
    request_time: int,
    alpha: float,
    beta: float,
    gamma: float,
    tau: float,
) -> Array:
    """One request, one block, one head: q, k, v [n + C, h] (history rows first, then candidates) -> [n + C, h]."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    alpha, beta, gamma, temperature = float(alpha), float(beta), float(gamma), softplus(float(tau))
    if len(history_times) != history_length:
        raise ValueError(f"{len(history_times)} history times for a history of {history_length}")
    out = np.zeros_like(v)
    for m in range(len(q)):
        is_candidate = m >= history_length
        # Python integers, so that differences of times cannot wrap around.
        position = history_length if is_candidate else m
        time = int(request_time) if is_candidate else int(history_times[m])
        logits: list[float] = []
        values: list[Array] = []
        for j in range(history_length):
            bias = (
                alpha * math.log2(1 + abs(position - j))
                + beta * math.log2(1 + abs(time - int(history_times[j])))
                + gamma
            )
            logits.append((float(q[m] @ k[j]) + bias) / temperature)
            values.append(v[j])
        if is_candidate:
            logits.append(float(q[m] @ k[m]) / temperature)
            values.append(v[m])
        out[m] = attend(logits, values)
    return out


def full_attention(q: Array, k: Array, v: Array, *, tau: float) -> Array:
    """One head, no bias, every query sees every key: q, k, v [B, h] -> [B, h]."""
    temperature = softplus(float(tau))
    out = np.zeros_like(v)
    for m in range(len(q)):
        out[m] = attend([float(q[m] @ k[j]) / temperature for j in range(len(k))], list(v))
    return out


# Layers


def run_block(
    weights: dict[str, Array], request: OracleRequest, block: int, candidates: Array, *, heads: int, head_dim: int
) -> Array:
    """The stack of layers of one block: candidate tokens [C, d] -> z_b [C, d]."""
    items, actions, times = request.blocks[block]
    n = len(items)
    x = np.concatenate([history_tokens(weights, items, actions), candidates])
    for number in range(weights["layers/qkv_w"].shape[0]):
        own = {
            name.removeprefix("layers/"): w[number, block] for name, w in weights.items() if name.startswith("layers/")
        }
        temperature, bias = own["temperature"][request.scenario], own["bias"][request.scenario]

        def attention(
            head: int, q: Array, k: Array, v: Array, temperature: Array = temperature, bias: Array = bias
        ) -> Array:
            return sumi_attention(
                q,
                k,
                v,
                history_length=n,
                history_times=times,
                request_time=request.request_time,
                alpha=bias[head, 0],
                beta=bias[head, 1],
                gamma=bias[head, 2],
                tau=temperature[head],
            )

        x = layer(own, x, attention, heads=heads, head_dim=head_dim)
    return x[n:]


def fuse(weights: dict[str, Array], z: Array, scenario: int, *, heads: int, head_dim: int) -> Array:
    """G: the fusion layer over one candidate's block outputs, [B, d] -> [B, d]."""
    own = {name.removeprefix("fusion/"): w for name, w in weights.items() if name.startswith("fusion/")}
    temperature = own["temperature"][scenario]

    def attention(head: int, q: Array, k: Array, v: Array) -> Array:
        return full_attention(q, k, v, tau=temperature[head])

    return layer(own, z, attention, heads=heads, head_dim=head_dim)


def layer(own: dict[str, Array], x: Array, attention: Attention, *, heads: int, head_dim: int) -> Array:
    """One layer with its own weights (names without prefix) over tokens x [n, d] -> [n, d]."""
    q, k, v = split_heads(x @ own["qkv_w"] + own["qkv_b"], heads=heads, head_dim=head_dim)
    o = np.concatenate([attention(head, q[head], k[head], v[head]) for head in range(heads)], axis=1)
    y = np.zeros_like(x)
    for m in range(len(x)):
        middle = layer_norm(x[m] + o[m] @ own["out_w"] + own["out_b"], own["norm1_scale"], own["norm1_shift"])
        hidden = relu(middle @ own["ffn1_w"] + own["ffn1_b"])
        y[m] = layer_norm(middle + hidden @ own["ffn2_w"] + own["ffn2_b"], own["norm2_scale"], own["norm2_shift"])
    return y


def split_heads(qkv: Array, *, heads: int, head_dim: int) -> tuple[list[Array], list[Array], list[Array]]:
    """[n, 3*H*h] -> q, k, v, each a list over heads of [n, h]: three parts of H*h columns, head-major in each."""
    if qkv.shape[1] != 3 * heads * head_dim:
        raise ValueError(f"qkv has {qkv.shape[1]} columns, not 3 * {heads} * {head_dim}")
    parts: list[list[Array]] = []
    for part in range(3):
        starts = [(part * heads + head) * head_dim for head in range(heads)]
        parts.append([qkv[:, start : start + head_dim] for start in starts])
    return parts[0], parts[1], parts[2]


def gate(weights: dict[str, Array], u: Array) -> Array:
    """Squeeze-and-excitation: u [B*d] -> Y [B*d]."""
    squeezed = relu(u @ weights["gate/squeeze_w"] + weights["gate/squeeze_b"])
    return u * sigmoid(squeezed @ weights["gate/excite_w"] + weights["gate/excite_b"])


def layer_norm(x: Array, scale: Array, shift: Array) -> Array:
    """LN(x; g, s) of one vector [d], population variance."""
    mean = float(np.mean(x))
    variance = float(np.mean((x - mean) ** 2))
    return (x - mean) / math.sqrt(variance + LAYER_NORM_EPS) * scale + shift


def relu(x: Array) -> Array:
    """max(x, 0), elementwise."""
    return np.maximum(x, 0.0)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), elementwise, without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), dtype=np.float64)


def softplus(x: float) -> float:
    """log(1 + exp(x)), without overflow."""
    return float(np.logaddexp(0.0, x))
