"""The Climber oracle against examples worked by hand from docs/models.md."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flame_jax.schema import Block, Feature, FeatureSchema
from tests.oracles.climber import (
    OracleRequest,
    embed_feature,
    full_attention,
    fuse,
    layer_norm,
    rank,
    split_heads,
    sumi_attention,
)

Params = dict[str, NDArray[Any]]
TAU_ONE = math.log(math.e - 1.0)  # softplus(TAU_ONE) = 1


def logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_two_tokens_by_hand() -> None:
    # One event (position 0, time 97) and one candidate (position 1, time 100); softplus(0) = ln 2.
    # Event: sees itself alone, so its output is v_0 = (1, 2).
    # Candidate: q_1 . k_0 = 2*1 + 1*(-1) = 1;  bias = 0.5*log2(2) + 0.25*log2(1 + 3) - 2 = 0.5 + 0.5 - 2 = -1
    #            s(1, 0) = (1 - 1) / ln 2 = 0
    #            q_1 . k_1 = 2*0 + 1*1 = 1;  s(1, own) = 1 / ln 2, exp of which is e^(1/ln 2) = 4.2320861
    #            weights 1/5.2320861 = 0.1911284 and 0.8088716
    #            o = 0.1911284*(1, 2) + 0.8088716*(-3, 4) = (-2.2354864, 3.6177432)
    out = sumi_attention(
        np.array([[5.0, 7.0], [2.0, 1.0]]),
        np.array([[1.0, -1.0], [0.0, 1.0]]),
        np.array([[1.0, 2.0], [-3.0, 4.0]]),
        history_length=1,
        history_times=np.array([97]),
        request_time=100,
        alpha=0.5,
        beta=0.25,
        gamma=-2.0,
        tau=0.0,
    )
    np.testing.assert_allclose(out, [[1.0, 2.0], [-2.2354864, 3.6177432]], atol=1e-6)


def test_history_sees_later_history_and_its_own_bias() -> None:
    # Two events, zero queries, times 0 and 7: bias(0, 0) = gamma, bias(0, 1) = log2(2) + log2(8) + gamma = 4 + gamma.
    # Event 0 weighs event 1 by sigmoid(4) and, times and positions being symmetric, event 1 weighs event 0 the same.
    out = sumi_attention(
        np.zeros((2, 1)),
        np.ones((2, 1)),
        np.array([[0.0], [1.0]]),
        history_length=2,
        history_times=np.array([0, 7]),
        request_time=7,
        alpha=1.0,
        beta=1.0,
        gamma=-9.0,
        tau=TAU_ONE,
    )
    np.testing.assert_allclose(out, [[logistic(4.0)], [1.0 - logistic(4.0)]], rtol=1e-12)


def test_candidate_stands_one_past_the_history() -> None:
    # Two events, zero queries, alpha = ln 2 so that exp(alpha * log2(x)) = x. Distances from position 2 are 2 and 1,
    # so the weights are (1 + 2) : (1 + 1) : 1 (own) = 3 : 2 : 1: (3*6 + 2*12 + 1*24) / 6 = 11, and for own 0, 42/6 = 7.
    out = sumi_attention(
        np.zeros((4, 1)),
        np.ones((4, 1)),
        np.array([[6.0], [12.0], [24.0], [0.0]]),
        history_length=2,
        history_times=np.array([0, 7]),
        request_time=7,
        alpha=math.log(2.0),
        beta=0.0,
        gamma=0.0,
        tau=TAU_ONE,
    )
    np.testing.assert_allclose(out[2:], [[11.0], [7.0]], rtol=1e-12)


def test_empty_history_returns_values() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 4, 5))
    out = sumi_attention(
        q,
        k,
        v,
        history_length=0,
        history_times=np.zeros(0, dtype=np.int32),
        request_time=5,
        alpha=1.0,
        beta=2.0,
        gamma=3.0,
        tau=-1.0,
    )
    np.testing.assert_array_equal(out, v)


@pytest.mark.parametrize(("dtype", "first", "last"), [(np.int32, -(2**31), 2**31 - 1), (np.int64, -(2**63), 2**63 - 1)])
def test_large_times_do_not_overflow(dtype: type[np.signedinteger[Any]], first: int, last: int) -> None:
    # |last - first| = 2^bits - 1, so log2(1 + ...) is exactly the number of bits. Divided by softplus(1000) = 1000.
    bits = np.iinfo(dtype).bits
    out = sumi_attention(
        np.zeros((2, 1)),
        np.zeros((2, 1)),
        np.array([[1.0], [0.0]]),
        history_length=1,
        history_times=np.array([first], dtype=dtype),
        request_time=dtype(last),  # type: ignore[arg-type]
        alpha=0.0,
        beta=10.0,
        gamma=0.0,
        tau=1000.0,
    )
    np.testing.assert_allclose(out, [[1.0], [logistic(10.0 * bits / 1000.0)]], rtol=1e-12)
    # A logit far past exp's range.
    out = sumi_attention(
        np.zeros((2, 1)),
        np.zeros((2, 1)),
        np.array([[1.0], [0.0]]),
        history_length=1,
        history_times=np.array([first], dtype=dtype),
        request_time=last,
        alpha=0.0,
        beta=1e4,
        gamma=0.0,
        tau=-5.0,
    )
    np.testing.assert_array_equal(out, [[1.0], [1.0]])


def test_full_attention_by_hand() -> None:
    # Keys 0 and ln 3, query 1, temperature 1: weights 1/4 and 3/4. Query 0: 1/2 and 1/2.
    out = full_attention(
        np.array([[1.0], [0.0]]), np.array([[0.0], [math.log(3.0)]]), np.array([[4.0], [8.0]]), tau=TAU_ONE
    )
    np.testing.assert_allclose(out, [[7.0], [6.0]], rtol=1e-12)


def test_split_is_three_parts_head_major() -> None:
    q, k, v = split_heads(np.arange(12.0)[None], heads=2, head_dim=2)
    assert [x.tolist() for x in q] == [[[0, 1]], [[2, 3]]]
    assert [x.tolist() for x in k] == [[[4, 5]], [[6, 7]]]
    assert [x.tolist() for x in v] == [[[8, 9]], [[10, 11]]]


def test_features_by_hand() -> None:
    table = np.array([[1.0, 0.0], [10.0, 2.0], [100.0, 5.0]])
    assert embed_feature(table, Feature("a", "categorical", 3), 2).tolist() == [100.0, 5.0]
    assert embed_feature(table, Feature("a", "bits", 3), 0b101).tolist() == [101.0, 5.0]
    assert embed_feature(table, Feature("a", "bits", 3), 0).tolist() == [0.0, 0.0]
    assert embed_feature(table[1:2], Feature("a", "numeric"), -0.5).tolist() == [-5.0, -1.0]


def test_layer_norm_by_hand() -> None:
    # mean 2, population variance 1 (with Bessel's correction it would be 2).
    out = layer_norm(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([0.0, 1.0]))
    np.testing.assert_allclose(out, [-2.0 / math.sqrt(1 + 1e-6), 2.0 / math.sqrt(1 + 1e-6) + 1.0], rtol=1e-12)


def hand_model() -> tuple[Params, FeatureSchema, OracleRequest]:
    """One block, one layer, one head of size 3, d = 3, two tasks; see the test below."""
    schema = FeatureSchema(
        tasks=("click", "like"),
        scenarios=("other", "feed"),
        item_features=(Feature("genre", "categorical", 2), Feature("tags", "bits", 3)),
        user_features=(Feature("age", "numeric"),),
    )
    no_row = [99.0, -99.0, 7.0]
    layer: Params = {
        "qkv_w": np.zeros((3, 9)),
        "qkv_b": np.zeros(9),
        "out_w": np.eye(3),
        "out_b": np.zeros(3),
        "norm1_scale": np.ones(3),
        "norm1_shift": np.zeros(3),
        "ffn1_w": np.zeros((3, 1)),
        "ffn1_b": np.zeros(1),
        "ffn2_w": np.zeros((1, 3)),
        "ffn2_b": np.zeros(3),
        "norm2_scale": np.ones(3),
        "norm2_shift": np.zeros(3),
    }
    block = layer | {
        "qkv_w": np.concatenate([np.zeros((3, 6)), np.eye(3)], axis=1),
        "norm1_scale": np.full(3, math.sqrt(38.0)),
        "ffn1_w": np.array([[0.0], [0.0], [1.0]]),
        "ffn1_b": np.array([10.0]),
        "ffn2_w": np.array([[1.0, 0.0, 0.0]]),
        "ffn2_b": np.array([0.0, -1.0, -1.0]),
        "norm2_scale": np.full(3, math.sqrt(42.0)),
        "norm2_shift": np.array([0.0, 0.0, 1.0]),
        "temperature": np.array([[3.0], [TAU_ONE]]),
        "bias": np.array([[[9.0, 9.0, 9.0]], [[1.0, 1.0, math.log(3.0) - 3.0]]]),
    }
    fusion = layer | {
        "norm1_scale": np.full(3, math.sqrt(326.0)),
        "norm2_scale": np.full(3, math.sqrt(326.0)),
        "temperature": np.array([[1.0], [2.0]]),
    }
    params: Params = {
        "item": np.array([no_row, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        "action": np.array([[3.0, 0.0, 0.0], [0.0, 0.0, -1.0]]),
        "item_bias": np.array([[9.0, 9.0], [8.0, 8.0], [0.25, -0.5]]),
        "features/item.genre": np.array([no_row, [0.0, 1.0, 0.0]]),
        "features/item.tags": np.array([[0.0, 0.0, 1.0], no_row, [0.0, 1.0, 0.0]]),
        "features/user.age": np.array([[0.0, 2.0, 0.0]]),
        "gate/squeeze_w": np.array([[1.0], [0.0], [0.0]]),
        "gate/squeeze_b": np.array([-5.0]),
        "gate/excite_w": np.array([[1.0, -1.0, 0.0]]),
        "gate/excite_b": np.zeros(3),
        "head/expert_w": np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]),
        "head/expert_b": np.array([[0.0, 13.5]]),
        "head/mix_w": np.zeros((2, 3, 1)),
        "head/mix_b": np.zeros((2, 1)),
        "head/tower_w": np.stack([np.eye(2), np.eye(2)]),
        "head/tower_b": np.zeros((2, 2)),
        "head/logit_w": np.array([[0.1, 1.0], [0.0, 2.0]]),
        "head/logit_b": np.array([-1.0, 0.0]),
    }
    params |= {f"layers/{name}": w[None, None] for name, w in block.items()}
    params |= {f"fusion/{name}": w for name, w in fusion.items()}
    request = OracleRequest(
        blocks=[(np.array([1]), np.array([0]), np.array([1000]))],
        request_time=1003,
        scenario=1,
        candidates=np.array([2]),
        item_features={"genre": np.array([1]), "tags": np.array([0b101])},
        user_features={"age": 0.5},
        context_features={},
    )
    return params, schema, request


def test_rank_by_hand() -> None:
    # Event:     x_0 = (1,0,0) + (3,0,0) = (4,0,0).
    # Candidate: x_1 = (0,1,0) item + (0,0,-1) action 1 + (0,1,0) genre + (0,0,1) + (0,1,0) tags + 0.5*(0,2,0) age
    #                = (0,4,0).
    # Attention: q = k = 0, v = x; bias = log2(2) + log2(4) + ln 3 - 3 = ln 3, so weights 3/4 and 1/4: o = (3,1,0).
    # x + o = (3,5,0): mean 8/3, variance 38/9, normalised (1,7,-8)/sqrt 38, scaled x' = (1,7,-8).
    # Feed-forward: relu(-8 + 10) = 2, so x' + (2,0,0) + (0,-1,-1) = (3,6,-9): mean 0, variance 42, scaled (3,6,-9),
    # shifted z_0 = (3,6,-8).
    # Fusion: v = 0. LN(3,6,-8): mean 1/3, variance 326/9, normalised (8,17,-25)/sqrt 326, scaled (8,17,-25); again,
    # mean 0, variance 326: G = (8,17,-25).
    # Gate: relu(8 - 5) = 3; sigmoid(3,-3,0): Y = (8 sigmoid(3), 17 sigmoid(-3), -12.5)
    #     = (7.6205930, 0.8062398, -12.5).
    # Head: the one expert gives (8.4268329, 1), which both towers pass on.
    # click: 0.84268329 + 1 - 1 + 0.25 = 1.0926833. like: 2 - 0.5 = 1.5.
    params, schema, request = hand_model()
    answer = rank(params, schema, request, heads=1, head_dim=3)
    assert answer.dtype == np.float64
    np.testing.assert_allclose(answer, [[logistic(1.0926833), logistic(1.5)]], atol=1e-6)


def test_fusion_mixes_blocks_by_scenario() -> None:
    # Two blocks, z_0 = (0, 3, -3), z_1 = (2, -1, -1); two heads of size 1, columns q0 q1 k0 k1 v0 v1.
    # Head 0: q = k = v = first component, temperature 4. Row 0 has q = 0: o = (0 + 2)/2 = 1.
    #         Row 1: s = (0, 4/4), o = 2*sigmoid(1).
    # Head 1: q = k = 0, v = second component: o = (3 - 1)/2 = 1 for both rows.
    # W_o adds head 0 to the first component and head 1 to the second: (1, 4, -3) and (2 + 2*sigmoid(1), 0, -1).
    # No feed-forward and unit norms: G = LN(LN(.)).
    qkv = np.zeros((3, 6))
    qkv[0, [0, 2, 4]] = 1.0
    qkv[1, 5] = 1.0
    weights = {
        "fusion/qkv_w": qkv,
        "fusion/qkv_b": np.zeros(6),
        "fusion/out_w": np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        "fusion/out_b": np.zeros(3),
        "fusion/norm1_scale": np.ones(3),
        "fusion/norm1_shift": np.zeros(3),
        "fusion/ffn1_w": np.zeros((3, 1)),
        "fusion/ffn1_b": np.zeros(1),
        "fusion/ffn2_w": np.zeros((1, 3)),
        "fusion/ffn2_b": np.zeros(3),
        "fusion/norm2_scale": np.ones(3),
        "fusion/norm2_shift": np.zeros(3),
        "fusion/temperature": np.array([[0.0, 0.0], [math.log(math.exp(4.0) - 1.0), 0.0]]),
    }

    def norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-6)

    fused = fuse(weights, np.array([[0.0, 3.0, -3.0], [2.0, -1.0, -1.0]]), 1, heads=2, head_dim=1)
    mixed = np.array([[1.0, 4.0, -3.0], [2.0 + 2.0 * logistic(1.0), 0.0, -1.0]])
    np.testing.assert_allclose(fused, [norm(norm(row)) for row in mixed], rtol=1e-12)


def random_model(seed: int = 0) -> tuple[Params, FeatureSchema, OracleRequest]:
    """Two blocks (the second empty), three layers, two heads of size 3, d = 4, every kind of feature."""
    rng = np.random.default_rng(seed)
    schema = FeatureSchema(
        tasks=("click", "like"),
        scenarios=("home", "feed", "search"),
        actions=2,
        blocks=(Block("all"), Block("likes", (1,))),
        item_features=(Feature("genre", "categorical", 3), Feature("tags", "bits", 4)),
        user_features=(Feature("age", "numeric"),),
        context_features=(Feature("hour", "categorical", 24),),
    )
    d, H, h, f, L, B, S = 4, 2, 3, 5, 3, 2, 3
    layer = {
        "qkv_w": (d, 3 * H * h),
        "qkv_b": (3 * H * h,),
        "out_w": (H * h, d),
        "out_b": (d,),
        "norm1_scale": (d,),
        "norm1_shift": (d,),
        "norm2_scale": (d,),
        "norm2_shift": (d,),
        "ffn1_w": (d, f),
        "ffn1_b": (f,),
        "ffn2_w": (f, d),
        "ffn2_b": (d,),
        "temperature": (S, H),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "item": (11, d),
        "action": (3, d),
        "item_bias": (11, 2),
        "features/item.genre": (3, d),
        "features/item.tags": (4, d),
        "features/user.age": (1, d),
        "features/context.hour": (24, d),
        "gate/squeeze_w": (B * d, 2),
        "gate/squeeze_b": (2,),
        "gate/excite_w": (2, B * d),
        "gate/excite_b": (B * d,),
        "head/expert_w": (2, B * d, 6),
        "head/expert_b": (2, 6),
        "head/mix_w": (2, B * d, 2),
        "head/mix_b": (2, 2),
        "head/tower_w": (2, 6, 5),
        "head/tower_b": (2, 5),
        "head/logit_w": (2, 5),
        "head/logit_b": (2,),
        "layers/bias": (L, B, S, H, 3),
    }
    shapes |= {f"layers/{name}": (L, B, *shape) for name, shape in layer.items()}
    shapes |= {f"fusion/{name}": shape for name, shape in layer.items()}
    params: Params = {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}
    empty = np.zeros(0, dtype=np.int32)
    request = OracleRequest(
        blocks=[(np.array([3, 1, 0]), np.array([0, 0, 0]), np.array([10, 500, 70000])), (empty, empty, empty)],
        request_time=80000,
        scenario=1,
        candidates=np.array([4, 0, 7, 10]),
        item_features={"genre": np.array([0, 1, 2, 1]), "tags": np.array([0, 5, 15, 8])},
        user_features={"age": 0.3},
        context_features={"hour": 17},
    )
    return params, schema, request


@pytest.mark.parametrize("kept", [[0], [2], [3, 1], [3, 2, 1, 0], [1, 1, 2]])
def test_candidates_do_not_see_each_other(kept: list[int]) -> None:
    params, schema, request = random_model()
    everyone = rank(params, schema, request, heads=2, head_dim=3)
    fewer = replace(
        request,
        candidates=request.candidates[kept],
        item_features={name: values[kept] for name, values in request.item_features.items()},
    )
    np.testing.assert_allclose(rank(params, schema, fewer, heads=2, head_dim=3), everyone[kept], rtol=1e-12)


def test_rank_heeds_everything_it_is_given() -> None:
    params, schema, request = random_model()
    answer = rank(params, schema, request, heads=2, head_dim=3)
    assert answer.shape == (4, 2)
    assert np.all((answer > 0) & (answer < 1))
    items, actions, times = request.blocks[0]
    changes: list[OracleRequest] = [
        replace(request, scenario=2),
        replace(request, request_time=90000),
        replace(request, user_features={"age": 0.4}),
        replace(request, context_features={"hour": 18}),
        replace(request, item_features=request.item_features | {"tags": np.array([1, 4, 7, 9])}),
        replace(request, blocks=[(items + 1, actions, times), request.blocks[1]]),
        replace(request, blocks=[(items, actions + 1, times), request.blocks[1]]),
        replace(request, blocks=[(items, actions, times // 4), request.blocks[1]]),
        replace(request, blocks=[request.blocks[1], request.blocks[0]]),
        replace(request, blocks=[request.blocks[1], request.blocks[1]]),
    ]
    for number, change in enumerate(changes):
        other = rank(params, schema, change, heads=2, head_dim=3)
        assert np.all(np.abs(other - answer).max(axis=1) > 1e-9), f"change {number} changed nothing"
    for name in params:
        other = rank(params | {name: params[name] * 1.5}, schema, request, heads=2, head_dim=3)
        assert np.abs(other - answer).max() > 1e-9, f"weight {name} is not read"


def test_no_candidates_and_wrong_blocks() -> None:
    params, schema, request = random_model()
    none = replace(
        request,
        candidates=request.candidates[:0],
        item_features={name: values[:0] for name, values in request.item_features.items()},
    )
    assert rank(params, schema, none, heads=2, head_dim=3).shape == (0, 2)
    with pytest.raises(ValueError, match="request has 1 blocks, schema 2"):
        rank(params, schema, replace(request, blocks=request.blocks[:1]), heads=2, head_dim=3)
