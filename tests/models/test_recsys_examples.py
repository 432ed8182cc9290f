"""recsys-examples' tensors in our stack, against a float64 forward of that repository's layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flame_jax.config import HstuConfig, ModelConfig
from flame_jax.models.hstu_layer import hstu_layer
from flame_jax.models.recsys_examples import layers_from_recsys_examples
from flame_jax.packing import CANDIDATE_COUNT, CANDIDATE_START, HISTORY_LENGTH, row_width
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Silu

WIDTH, HEADS, DQK, DV, DEPTH, DIVISOR = 12, 3, 4, 6, 2, 30.0
HISTORY, CANDIDATES, ALIGN = 13, 5, 16
MIXED, VALUES = 2 * HEADS * (DQK + DV), HEADS * DV
SIZES: dict[str, Any] = {"num_heads": HEADS, "attention_dim": DQK, "hidden_dim": DV}
BLOCK = "_hstu_block._attention_layers"


def native(seed: int = 0) -> dict[str, np.ndarray]:
    """The native layer's state: linear modules of (out, in)."""
    random = np.random.default_rng(seed)
    shapes = {
        "_linear_uvqk.weight": (MIXED, WIDTH),
        "_linear_uvqk.bias": (MIXED,),
        "_linear_proj.weight": (WIDTH, VALUES),
        "_input_layernorm_weight": (WIDTH,),
        "_input_layernorm_bias": (WIDTH,),
        "_output_layernorm_weight": (VALUES,),
        "_output_layernorm_bias": (VALUES,),
    }
    return {
        f"{BLOCK}.{i}.{name}": random.normal(scale=0.5, size=shape).astype(np.float32)
        for i in range(DEPTH)
        for name, shape in shapes.items()
    }


def fused(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same maths in the fused layer's plain parameters of (in, out)."""
    out = {}
    for name, value in state.items():
        if "_linear_" in name:
            head, _, kind = name.rpartition(".")
            out[f"{head}_{kind}"] = value.T
        else:
            out[name] = value
    return out


def silu(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = x / (1 + np.exp(-x))
    return y


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    y: np.ndarray = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias
    return y


def forward(state: dict[str, np.ndarray], x: np.ndarray, *, heads_outermost: bool) -> np.ndarray:
    """The native layers over x [history + candidates, D], in float64 and loops."""
    x = x.astype(np.float64)
    for i in range(DEPTH):
        own = {n.removeprefix(f"{BLOCK}.{i}."): t.astype(np.float64) for n, t in state.items() if f".{i}." in n}
        u, v, q, k = (np.zeros((len(x), HEADS, size)) for size in (DV, DV, DQK, DQK))
        for m, row in enumerate(x):
            h = norm(row, own["_input_layernorm_weight"], own["_input_layernorm_bias"])
            mixed = silu(own["_linear_uvqk.weight"] @ h + own["_linear_uvqk.bias"])
            if heads_outermost:
                for head, part in enumerate(mixed.reshape(HEADS, -1)):
                    cuts = [DV, 2 * DV, 2 * DV + DQK]
                    u[m, head], v[m, head], q[m, head], k[m, head] = np.split(part, cuts)
            else:
                parts = np.split(mixed, [VALUES, 2 * VALUES, 2 * VALUES + HEADS * DQK])
                u[m], v[m], q[m], k[m] = (part.reshape(HEADS, -1) for part in parts)
        y = np.zeros_like(x)
        for m in range(len(x)):
            seen = range(m + 1) if m < HISTORY else [*range(HISTORY), m]
            o = np.zeros((HEADS, DV))
            for head in range(HEADS):
                for j in seen:
                    o[head] += silu(q[m, head] @ k[j, head] / np.sqrt(DQK)) / DIVISOR * v[j, head]
            gated = u[m].ravel() * norm(o.ravel(), own["_output_layernorm_weight"], own["_output_layernorm_bias"])
            y[m] = own["_linear_proj.weight"] @ gated + x[m]
        x = y
    return x


def ours(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Our layers over the same rows, the candidates moved to an aligned one."""
    config = ModelConfig(
        architecture="hstu",
        width=WIDTH,
        layers=DEPTH,
        heads=HEADS,
        head_dim=DQK,
        hstu=HstuConfig(variant="recsys_examples", value_dim=DV, attention_divisor=DIVISOR),
    )
    rows = np.zeros((1, row_width(1)), np.int32)
    rows[0, HISTORY_LENGTH], rows[0, CANDIDATE_START], rows[0, CANDIDATE_COUNT] = HISTORY, ALIGN, CANDIDATES
    packed = np.zeros((1, 2 * ALIGN, WIDTH), np.float32)
    packed[0, :HISTORY], packed[0, ALIGN : ALIGN + CANDIDATES] = x[:HISTORY], x[HISTORY:]
    attention = partial(
        sumi_attention,
        rows=jnp.asarray(rows),
        time=jnp.zeros((1, 2 * ALIGN), jnp.int32),
        activation=Silu(DQK**-0.5, DIVISOR),
        causal=True,
        align=ALIGN,
        window=ALIGN,
    )
    y = jnp.asarray(packed)
    with jax.default_matmul_precision("highest"):
        for i in range(DEPTH):
            y = hstu_layer(y, {name: jnp.asarray(w) for name, w in weights.items()}, i, attention, config=config)
    return np.concatenate([np.asarray(y)[0, :HISTORY], np.asarray(y)[0, ALIGN : ALIGN + CANDIDATES]])


STATE = native()
X = np.random.default_rng(1).normal(size=(HISTORY + CANDIDATES, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("heads_outermost", [False, True])
@pytest.mark.parametrize("spelling", ["native", "fused", "one layer each"])
def test_our_stack_gives_the_layers_numbers(spelling: str, heads_outermost: bool) -> None:
    other = fused(STATE)
    state = {"native": STATE, "fused": other}.get(spelling) or {
        **{name: value for name, value in STATE.items() if ".0." in name},
        **{name: value for name, value in other.items() if ".1." in name},
    }
    weights = layers_from_recsys_examples(state, **SIZES, heads_outermost=heads_outermost)
    right = forward(STATE, X, heads_outermost=heads_outermost)
    assert np.abs(ours(weights, X) - right).max() <= 1e-5 * np.abs(right).max()


def test_the_two_orders_of_columns_are_different_models() -> None:
    one, other = (forward(STATE, X, heads_outermost=flag) for flag in (False, True))
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("prefix", ["module._dense_module.", "model.", ""])
def test_the_block_may_lie_anywhere(prefix: str) -> None:
    inside = {name.replace("_hstu_block.", prefix): value for name, value in STATE.items()}
    found = layers_from_recsys_examples(inside, **SIZES)
    expected = layers_from_recsys_examples(STATE, **SIZES)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], value)


def refusal(state: dict[str, np.ndarray], **changed: Any) -> str:
    with pytest.raises(ValueError) as caught:
        layers_from_recsys_examples(state, **(SIZES | changed))
    return str(caught.value)


def test_two_blocks_are_refused_by_their_places() -> None:
    said = refusal({f"{copy}.{name}": value for copy in ("model", "ema") for name, value in STATE.items()})
    assert f"ema.{BLOCK}" in said
    assert f"model.{BLOCK}" in said


def test_a_tensor_in_both_spellings_is_refused_with_both_names() -> None:
    extra = f"{BLOCK}.1._linear_proj_weight"
    said = refusal(STATE | {extra: fused(STATE)[extra]})
    assert f"both {BLOCK}.1._linear_proj.weight and {extra}" in said


def test_everything_wrong_is_named_at_once() -> None:
    state = dict(STATE)
    del state[f"{BLOCK}.1._linear_uvqk.bias"]
    state[f"{BLOCK}.0._linear_proj.bias"] = np.zeros(WIDTH, np.float32)
    state["_embedding.weight"] = np.zeros((3, WIDTH), np.float32)
    state[f"{BLOCK}.0._linear_uvqk.weight"] = state[f"{BLOCK}.0._linear_uvqk.weight"].T
    said = refusal(state)
    for part in (
        f"missing {BLOCK}.1._linear_uvqk.bias or {BLOCK}.1._linear_uvqk_bias",
        f"extra {BLOCK}.0._linear_proj.bias",
        "extra _embedding.weight",
        f"{BLOCK}.0._linear_uvqk.weight is ({WIDTH}, {MIXED}), expected ({MIXED}, {WIDTH})",
    ):
        assert part in said


def test_a_gap_in_the_layers_and_no_layers_at_all() -> None:
    assert "[1]" in refusal({name: value for name, value in STATE.items() if ".1." in name})
    assert "_attention_layers.0" in refusal({"w": np.zeros(3, np.float32)})


def test_other_sizes_are_refused() -> None:
    assert "_linear_uvqk.weight is" in refusal(STATE, num_heads=HEADS + 1)
