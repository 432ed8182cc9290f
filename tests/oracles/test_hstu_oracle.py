"""The HSTU oracle and the shared head against examples worked by hand from docs/models.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from flame_jax.schema import Block, Feature, FeatureSchema
from tests.oracles.climber import OracleRequest
from tests.oracles.head import history_rows, logits, position_row
from tests.oracles.hstu import (
    Settings,
    age_bucket,
    attention,
    encode,
    gap_bucket,
    rank,
    relative_row,
    research_bias,
    stack,
)
from tests.oracles.small import head_shapes, token_shapes

Params = dict[str, NDArray[Any]]
Variant = Literal["dlrm_v3", "recsys_examples", "research"]
VARIANTS: tuple[Variant, ...] = ("dlrm_v3", "recsys_examples", "research")

SCHEMA = FeatureSchema(
    tasks=("click", "like"),
    actions=3,
    block_length=8,
    item_features=(Feature("genre", "categorical", 3), Feature("tags", "bits", 4)),
    user_features=(Feature("age", "numeric"),),
    context_features=(Feature("hour", "categorical", 24),),
)
EMPTY = np.zeros(0, dtype=np.int32)
REQUEST = OracleRequest(
    blocks=[(np.array([3, 1, 0, 5]), np.array([0, 2, 1, 1]), np.array([10, 500, 70000, 79900]))],
    request_time=80000,
    scenario=0,
    candidates=np.array([4, 0, 7, 10]),
    item_features={"genre": np.array([0, 1, 2, 1]), "tags": np.array([0, 5, 15, 8])},
    user_features={"age": 0.3},
    context_features={"hour": 17},
)


def random_model(variant: Variant, *, interleave: bool = False, encoding: bool = True) -> tuple[Params, Settings]:
    """A small model whose every size differs."""
    rng = np.random.default_rng(7)
    H, dqk, dv, D, L, P, M = 2, 3, 5, 7, 2, 3, 4
    shapes: dict[str, tuple[int, ...]] = {
        **token_shapes(D),
        "layers/uvqk_w": (L, D, 2 * H * (dv + dqk)),
        "layers/out_w": (L, (3 if variant == "dlrm_v3" else 1) * H * dv, D),
        "final_scale": (D,),
        "final_shift": (D,),
        **head_shapes(M, D),
    }
    if encoding:
        shapes |= {"position": (3, D), "time": (20, D)}
    if variant == "research":
        shapes |= {"layers/out_b": (L, D), "layers/pos": (L, 2 * P - 1), "layers/ts": (L, 30)}
    else:
        shapes |= {
            "layers/uvqk_b": (L, 2 * H * (dv + dqk)),
            "layers/input_scale": (L, D),
            "layers/input_shift": (L, D),
            "layers/output_scale": (L, H * dv),
            "layers/output_shift": (L, H * dv),
        }
    params = {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}
    bias_positions = P if variant == "research" else 0
    return params, Settings(variant, H, dqk, dv, 2.5, interleave=interleave, bias_positions=bias_positions)


# Attention


def test_attention_of_two_tokens_by_hand() -> None:
    # dqk = 2 with scale 1/2 and N = 4; silu(1) = 0.7310586, silu(3) = 2.8577224, silu(-1) = -0.2689414.
    # Event:     q_0 . k_0 = 2, s = 1, A = 0.7310586/4 = 0.1827646, o = A*(1, 2) = (0.1827646, 0.3655293)
    # Candidate: q_1 . k_0 = 4 + 2 = 6, s = 3, A = 2.8577224/4 = 0.7144306
    #            q_1 . k_1 = -2, s = -1, A = -0.2689414/4 = -0.0672354
    #            o = 0.7144306*(1, 2) - 0.0672354*(-3, 4) = (0.9161366, 1.1599197)
    out = attention(
        np.array([[1.0, 0.0], [2.0, 2.0]]),
        np.array([[2.0, 1.0], [-1.0, 0.0]]),
        np.array([[1.0, 2.0], [-3.0, 4.0]]),
        history=1,
        scale=0.5,
        divisor=4.0,
        bias=None,
    )
    np.testing.assert_allclose(out, [[0.1827646, 0.3655293], [0.9161366, 1.1599197]], atol=2e-7)


def test_attention_with_bias_by_hand() -> None:
    # No scale, N = 1, and the bias 1*(m == 0), 2*(m == 1, j == 0), -3*(m == 1, j == 1), not divided by anything.
    # Event:     s = 1*1 + 1 = 2, silu(2) = 1.7615942, o = 1.7615942 * 10
    # Candidate: s(1, 0) = -1*1 + 2 = 1, silu(1) = 0.7310586;  s(1, 1) = -1*-3 - 3 = 0, silu(0) = 0;  o = 7.310586
    table = {(0, 0): 1.0, (1, 0): 2.0, (1, 1): -3.0}
    out = attention(
        np.array([[1.0], [-1.0]]),
        np.array([[1.0], [-3.0]]),
        np.array([[10.0], [1000.0]]),
        history=1,
        scale=1.0,
        divisor=1.0,
        bias=lambda m, j: table[m, j],
    )
    np.testing.assert_allclose(out, [[17.615942], [7.310586]], atol=1e-6)


def test_who_sees_whom() -> None:
    # Scores of zero and a bias of 1 each: o = silu(1) * the sum of the values seen, which are powers of ten.
    seen: list[tuple[int, int]] = []

    def bias(m: int, j: int) -> float:
        seen.append((m, j))
        return 1.0

    values = 10.0 ** np.arange(5)[:, None]
    out = attention(np.zeros((5, 2)), np.zeros((5, 2)), values, history=3, scale=1.0, divisor=1.0, bias=bias)
    np.testing.assert_allclose(out[:, 0] / 0.7310585786300049, [1, 11, 111, 1111, 10111], rtol=1e-12)
    assert seen == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)] + [(3, j) for j in (0, 1, 2, 3)] + [
        (4, j) for j in (0, 1, 2, 4)
    ]


# Layers by hand
#
# x_0 = (1, -1) is an event at time 100 and x_1 = -x_0 a candidate at 104; H = 1, dqk = 4, dv = 2. LN leaves both as
# they are (to 5e-6), and the second row of W_uvqk is zero, so that h_0 W = w and h_1 W = -w with w its first row:
#     w = u (1, 2), v (1, 3), q (2, 0, 0, 0), k (1, 0, 0, 0)

X = np.array([[1.0, -1.0], [-1.0, 1.0]])
UVQK = np.array([[[1.0, 2, 1, 3, 2, 0, 0, 0, 1, 0, 0, 0], [0.0] * 12]])
WITH_WEIGHTS: Params = {
    "layers/uvqk_w": UVQK,
    "layers/uvqk_b": np.zeros((1, 12)),
    "layers/input_scale": np.ones((1, 2)),
    "layers/input_shift": np.zeros((1, 2)),
    "layers/output_scale": np.ones((1, 2)),
    "layers/output_shift": np.zeros((1, 2)),
}


def one_layer(params: Params, settings: Settings) -> NDArray[np.float64]:
    return stack(params, X, settings=settings, times=np.array([100]), request_time=104, history=1)


def test_dlrm_v3_layer_by_hand() -> None:
    # N = 2; silu of u only: u_0 = (0.7310586, 1.7615942), u_1 = (-0.2689414, -0.2384058).
    # Event:     s = 2*1/sqrt(4) = 1, A = 0.7310586/2 = 0.3655293, o = A*(1, 3) = (0.3655293, 1.0965879)
    #            LN(o) = (-1, 1) (to 4e-6), u*LN(o) = (-0.7310586, 1.7615942)
    # Candidate: s(1, 0) = -1, s(1, 1) = 1, and silu(1) - silu(-1) = 1: o = -1/2 * (1, 3) = (-0.5, -1.5)
    #            LN(o) = (1, -1), u*LN(o) = (-0.2689414, 0.2384058)
    # W_o makes it u + 2 o + 4 u*LN(o):
    #     y_0 = (1 + 0.7310586 + 0.7310586 - 2.9242344, -1 + 1.7615942 + 2.1931758 + 7.0463768)
    #     y_1 = (-1 - 0.2689414 - 1 - 1.0757656, 1 - 0.2384058 - 3 + 0.9536232)
    out_w = np.concatenate([np.eye(2), 2 * np.eye(2), 4 * np.eye(2)])[None]
    y = one_layer(WITH_WEIGHTS | {"layers/out_w": out_w}, Settings("dlrm_v3", 1, 4, 2, 2.0))
    np.testing.assert_allclose(y, [[-0.4621172, 10.0011468], [-3.344707, -1.2847826]], atol=1e-4)


def test_recsys_examples_layer_by_hand() -> None:
    # silu of everything:
    #     u_0 = (0.7310586, 1.7615942), v_0 = (0.7310586, 2.8577224), q_0 = 1.7615942, k_0 = 0.7310586
    #     u_1 = (-0.2689414, -0.2384058), v_1 = (-0.2689414, -0.1422776), q_1 = -0.2384058, k_1 = -0.2689414
    # N = 200 makes o so small that eps 1e-5 counts: LN(o) = (a, -a) / sqrt(a^2 + eps), a half of o's difference.
    # Event:     s = 1.2878285/2 = 0.6439143, silu = 0.4221745, N o = 0.4221745*v_0 = (0.3086343, 1.2064575)
    #            a = -0.4489116/N = -0.0022446, LN(o) = (-0.5788089, 0.5788089), u*LN(o) = (-0.4231432, 1.0196264)
    # Candidate: s(1, 0) = -0.1742886/2 = -0.0871443, silu = -0.0416748
    #            s(1, 1) = 0.0641172/2 = 0.0320586, silu = 0.0162862
    #            N o = -0.0416748*v_0 + 0.0162862*v_1 = (-0.0348468, -0.1214122)
    #            a = 0.0432827/N = 0.0002164, LN(o) = (0.0682763, -0.0682763), u*LN(o) = (-0.0183623, 0.0162775)
    # W_o = identity: y = x + u*LN(o).
    y = one_layer(
        WITH_WEIGHTS | {"layers/out_w": np.eye(2)[None]},
        Settings("recsys_examples", 1, 4, 2, 200.0),
    )
    np.testing.assert_allclose(y - X, [[-0.4231432, 1.0196264], [-0.0183623, 0.0162775]], atol=4e-5)


def test_research_layer_by_hand() -> None:
    # silu of everything (numbers as above), no scale; P = 2, so a difference of 0 reads pos[1] and of 1 pos[2].
    # The event is the newest and is asked at its own time, a gap of 0: ts[0]. The candidate is asked at 104: a gap of 4
    # to the event, ln 4 / 0.301 = 4.6, ts[4], and of 0 to itself. N = 1000, and a as above against eps 1e-6.
    # Event:     s = 1.2878285 + 0.1 + 0.3 = 1.6878285, silu = 1.4244233, N o = (1.0413368, 4.0706062)
    #            a = -1.5146347/N, LN(o) = (-0.8345230, 0.8345230), u*LN(o) = (-0.6100852, 1.4700908)
    # Candidate: s(1, 0) = -0.1742886 + 0.2 - 0.7 = -0.6742886, silu = -0.2275975
    #            s(1, 1) = 0.0641172 + 0.1 + 0.3 = 0.4641172, silu = 0.2849635
    #            N o = -0.2275975*v_0 + 0.2849635*v_1 = (-0.2430256, -0.6909544)
    #            a = 0.2239644/N, LN(o) = (0.2185502, -0.2185502), u*LN(o) = (-0.0587772, 0.0521037)
    # W_o = identity: y = x + u*LN(o) + (10, 20).
    params = {
        "layers/uvqk_w": UVQK,
        "layers/out_w": np.eye(2)[None],
        "layers/out_b": np.array([[10.0, 20.0]]),
        "layers/pos": np.array([[99.0, 0.1, 0.2]]),
        "layers/ts": np.array([[0.3, 99.0, 99.0, 99.0, -0.7]]),
    }
    y = one_layer(params, Settings("research", 1, 4, 2, 1000.0, bias_positions=2))
    np.testing.assert_allclose(y - X - [10.0, 20.0], [[-0.6100852, 1.4700908], [-0.0587772, 0.0521037]], atol=5e-6)


def test_heads_are_contiguous() -> None:
    # A candidate alone, H = dqk = dv = 2, all from the bias: v (1, 2 | 3, 4), q (1, 1 | 0, 0), k all ones, so that
    # s = sqrt(2) in head 0 and 0 in head 1. silu(sqrt(2)) = 1.4142136 * 0.8044297 = 1.1376354; W_o picks o out.
    params = {
        "layers/uvqk_w": np.zeros((1, 4, 16)),
        "layers/uvqk_b": np.array([[0.0] * 4 + [1.0, 2, 3, 4] + [1.0, 1, 0, 0] + [1.0] * 4]),
        "layers/input_scale": np.ones((1, 4)),
        "layers/input_shift": np.zeros((1, 4)),
        "layers/output_scale": np.ones((1, 4)),
        "layers/output_shift": np.zeros((1, 4)),
        "layers/out_w": np.concatenate([np.zeros((4, 4)), np.eye(4), np.zeros((4, 4))])[None],
    }
    x = np.arange(4.0)[None]
    y = stack(params, x, settings=Settings("dlrm_v3", 2, 2, 2, 1.0), times=EMPTY, request_time=0, history=0)
    np.testing.assert_allclose(y - x, [[1.1376354, 2.2752708, 0.0, 0.0]], atol=1e-6)


def test_research_bias_by_hand() -> None:
    # Three events at 0, 1, 3 and two candidates, asked at 10; pos = (-, -, 0, 1, 2) with P = 3, ts[b] = 10 * b.
    #     row 0: t' = 1; gap to 0: 1 -> bucket 0;                               biases 0
    #     row 1: t' = 3; gaps 3, 2 -> ln 3/0.301 = 3.65, ln 2/0.301 = 2.30;     biases 1 + 30, 0 + 20
    #     row 2: t' = 3, its own; gaps 3, 2, 0;                                 biases 2 + 30, 1 + 20, 0
    #     candidate: t' = 10, position 3; gaps 10, 9, 7, 0 -> 7.65, 7.30, 6.46; biases 2 + 70, 2 + 70, 1 + 60, 0
    own = {"pos": np.array([np.nan, np.nan, 0.0, 1.0, 2.0]), "ts": 10.0 * np.arange(8)}
    bias = research_bias(own, Settings("research", 1, 1, 1, 1.0, bias_positions=3), [0, 1, 3], 10)
    assert bias(0, 0) == 0
    assert [bias(1, j) for j in (0, 1)] == [31, 20]
    assert [bias(2, j) for j in (0, 1, 2)] == [32, 21, 0]
    for m in (3, 4):
        assert [bias(m, j) for j in (0, 1, 2, m)] == [72, 72, 61, 0]


# Buckets, positions, rows


@pytest.mark.parametrize(
    ("age", "row"),
    [(-(2**40), 0), (-1, 0), (0, 0), (59, 0), (60, 1), (239, 1), (240, 2), (539, 2), (540, 3), (2**62, 99)],
)
def test_age_bucket(age: int, row: int) -> None:
    assert age_bucket(age, 100) == row


def test_age_bucket_at_every_boundary() -> None:
    # The boundary of bucket k is 60 k^2 exactly; float64 gets it right as well.
    for k in range(1, 6000):
        for age, row in ((60 * k * k, k), (60 * k * k - 1, k - 1)):
            assert age_bucket(age, 10**9) == row == math.floor(math.sqrt(age / 60))
    assert age_bucket(60 * 5000**2, 1) == 0


def thresholds(count: int) -> list[int]:
    """The smallest integer of bucket k or above, for k = 1, 2, ...: ceil(e^(0.301 k)), to 50 digits."""
    with localcontext() as context:
        context.prec = 50
        return [math.ceil((Decimal("0.301") * k).exp()) for k in range(1, count + 1)]


def test_gap_bucket_against_integer_thresholds() -> None:
    assert thresholds(8) == [2, 2, 3, 4, 5, 7, 9, 12]
    assert [gap_bucket(d, 99) for d in range(9)] == [0, 0, 2, 3, 4, 5, 5, 6, 6]
    bounds = thresholds(140)
    assert bounds[75] > 2**32
    for d in range(3000):
        expected = sum(bound <= d for bound in bounds)
        assert gap_bucket(d, 999) == gap_bucket(-d, 999) == expected
    for k, bound in enumerate(bounds[:76], start=1):  # past 2^32, the largest gap of int32 times
        assert gap_bucket(bound, 999) == sum(other <= bound for other in bounds) >= k
        assert gap_bucket(bound - 1, 999) == sum(other <= bound - 1 for other in bounds) < k
    assert gap_bucket(-(2**62), 5) == 4
    assert gap_bucket(2**62, 1) == 0


def test_positions_are_clipped() -> None:
    # Reversed positions of four history rows are 4, 3, 2, 1; of candidates 0. A table of three rows ends at 2.
    assert [position_row(m, 4, 99) for m in range(6)] == [4, 3, 2, 1, 0, 0]
    assert [position_row(m, 4, 3) for m in range(6)] == [2, 2, 2, 1, 0, 0]
    assert [position_row(m, 4, 1) for m in range(6)] == [0] * 6
    assert [relative_row(d, 3) for d in (-9, -3, -2, -1, 0, 1, 2, 3, 9)] == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert [relative_row(d, 1) for d in (-1, 0, 1)] == [0, 0, 0]


def test_encoding_by_hand() -> None:
    # D = 4, so x is doubled. Two history rows of ages 60 and 300 (sqrt(5) = 2.2) and a candidate.
    x = np.ones((3, 4))
    position, time = np.array([[1.0], [2.0]]) * np.ones(4), np.array([[10.0], [20.0], [30.0]]) * np.ones(4)
    ages: dict[str, Any] = {"times": [700, 940], "request_time": 1000}
    np.testing.assert_array_equal(encode({"position": position, "time": time}, x, **ages)[:, 0], [34, 24, 13])
    np.testing.assert_array_equal(encode({"position": position}, x, **ages)[:, 0], [4, 4, 3])
    np.testing.assert_array_equal(encode({"time": time}, x, **ages)[:, 0], [32, 22, 12])
    np.testing.assert_array_equal(encode({}, x, **ages), x)


def test_interleaved_rows() -> None:
    weights = {"item": np.array([[0.0], [1.0], [2.0]]), "action": np.array([[10.0], [20.0], [30.0]])}
    items, actions, times = np.array([2, 1]), np.array([0, 1]), np.array([5, 8])
    rows, row_times = history_rows(weights, items, actions, times, interleave=True)
    np.testing.assert_array_equal(rows, [[2], [10], [1], [20]])
    assert row_times == [5, 5, 8, 8]
    rows, row_times = history_rows(weights, items, actions, times, interleave=False)
    np.testing.assert_array_equal(rows, [[12], [21]])
    assert row_times == [5, 8]
    rows, row_times = history_rows(weights, EMPTY, EMPTY, EMPTY, interleave=True)
    assert rows.shape == (0, 1)
    assert row_times == []


# Head


def head_params(experts: int) -> Params:
    rng = np.random.default_rng(3)
    shapes = {
        "item_bias": (4, 2),
        "head/expert_w": (experts, 5, 6),
        "head/expert_b": (experts, 6),
        "head/mix_w": (2, 5, experts),
        "head/mix_b": (2, experts),
        "head/tower_w": (2, 6, 3),
        "head/tower_b": (2, 3),
        "head/logit_w": (2, 3),
        "head/logit_b": (2,),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_one_expert_is_a_plain_mlp() -> None:
    params = head_params(1)
    y = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
    hidden = np.maximum(y @ params["head/expert_w"][0] + params["head/expert_b"][0], 0)
    for t in range(2):
        tower = np.maximum(hidden @ params["head/tower_w"][t] + params["head/tower_b"][t], 0)
        expected = tower @ params["head/logit_w"][t] + params["head/logit_b"][t] + params["item_bias"][2, t]
        np.testing.assert_allclose(logits(params, y, 2)[t], expected, rtol=1e-12)


def test_mixture_by_hand() -> None:
    # y = 2; experts relu(2*1) = 2 and relu(2*-1 + 8) = 6. Task 0 mixes by softmax(ln 3, 0) = (3/4, 1/4): z = 3; task 1
    # by softmax(2*-ln 3, ln 9 - 4 ln 3) = (1/2, 1/2): z = 4. Towers: relu(3 + 1) = 4 and relu(4*-1 + 1) = 0.
    # logits: 4*10 + 0.5 + 100 and 0 + 0.25 + 200.
    params: Params = {
        "item_bias": np.array([[0.0, 0.0], [100.0, 200.0]]),
        "head/expert_w": np.array([[[1.0]], [[-1.0]]]),
        "head/expert_b": np.array([[0.0], [8.0]]),
        "head/mix_w": np.array([[[0.0, 0.0]], [[-math.log(3), 0.0]]]),
        "head/mix_b": np.array([[math.log(3), 0.0], [0.0, math.log(9) - 4 * math.log(3)]]),
        "head/tower_w": np.array([[[1.0]], [[-1.0]]]),
        "head/tower_b": np.array([[1.0], [1.0]]),
        "head/logit_w": np.array([[10.0], [10.0]]),
        "head/logit_b": np.array([0.5, 0.25]),
    }
    np.testing.assert_allclose(logits(params, np.array([2.0]), 1), [140.5, 200.25], rtol=1e-12)


# The whole model


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_history(variant: Variant) -> None:
    # Of a candidate alone: o = silu(s(own, own)) / N * v. Neither position nor order plays a part.
    params, settings = random_model(variant)
    request = replace(REQUEST, blocks=[(EMPTY, EMPTY, EMPTY)])
    answer = rank(params, SCHEMA, request, settings)
    assert answer.shape == (4, 2)
    assert np.all(np.isfinite(answer))
    np.testing.assert_array_equal(rank(params, SCHEMA, replace(request, request_time=5), settings), answer)
    assert np.abs(rank(params, SCHEMA, REQUEST, settings) - answer).max() > 1e-9
    x = np.random.default_rng(1).normal(size=(1, 7))
    y = stack(params, x, settings=settings, times=EMPTY, request_time=9, history=0)
    z = stack(params, np.repeat(x, 3, axis=0), settings=settings, times=EMPTY, request_time=7, history=0)
    np.testing.assert_allclose(z, np.repeat(y, 3, axis=0), rtol=1e-12)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kept", [[0], [3, 1], [1, 1, 2], []])
def test_candidates_do_not_see_each_other(variant: Variant, interleave: bool, kept: list[int]) -> None:
    params, settings = random_model(variant, interleave=interleave)
    everyone = rank(params, SCHEMA, REQUEST, settings)
    fewer = replace(
        REQUEST,
        candidates=REQUEST.candidates[kept],
        item_features={name: values[kept] for name, values in REQUEST.item_features.items()},
    )
    np.testing.assert_allclose(rank(params, SCHEMA, fewer, settings), everyone[kept], rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_history_is_causal(variant: Variant) -> None:
    params, settings = random_model(variant)
    x = np.random.default_rng(2).normal(size=(6, 7))
    times = np.array([10, 500, 70000, 79900])

    def run(x: NDArray[Any], times: NDArray[Any] = times, request_time: int = 80000) -> NDArray[np.float64]:
        return stack(params, x, settings=settings, times=times, request_time=request_time, history=4)

    before = run(x)
    changed = x.copy()
    changed[2] += np.arange(7.0)
    after = run(changed)
    np.testing.assert_array_equal(after[:2], before[:2])
    assert np.all(np.abs(after[2:] - before[2:]).max(axis=1) > 1e-9)
    # A candidate changes nothing but itself.
    changed = x.copy()
    changed[4] += np.arange(7.0)
    after = run(changed)
    np.testing.assert_array_equal(after[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])
    assert np.abs(after[4] - before[4]).max() > 1e-9
    # The request time reaches candidates only, and the layers of the variants without a time bias not at all.
    after = run(x, request_time=90000)
    np.testing.assert_array_equal(after[:4], before[:4])
    assert np.all(np.abs(after[4:] - before[4:]).max(axis=1) > 1e-9) == (variant == "research")


def test_research_reads_the_next_rows_time() -> None:
    # Not quite causal in times: row 1 is asked at row 2's time, row 0 is not.
    params, settings = random_model("research")
    x = np.random.default_rng(2).normal(size=(5, 7))
    before = stack(params, x, settings=settings, times=np.array([1, 9, 99, 999]), request_time=9999, history=4)
    after = stack(params, x, settings=settings, times=np.array([1, 9, 50, 999]), request_time=9999, history=4)
    np.testing.assert_array_equal(after[0], before[0])
    assert np.all(np.abs(after[1:] - before[1:]).max(axis=1) > 1e-9)
    # Two rows of the same time, as interleaving makes them, and a newest row: both are asked at their own time.
    pair = stack(params, x[[0, 1, 4]], settings=settings, times=np.array([5, 5]), request_time=9999, history=2)
    later = stack(params, x[[0, 1, 4]], settings=settings, times=np.array([0, 0]), request_time=9994, history=2)
    np.testing.assert_array_equal(pair, later)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("encoding", [False, True])
def test_large_times_do_not_overflow(variant: Variant, encoding: bool) -> None:
    params, settings = random_model(variant, encoding=encoding)
    items, actions, _ = REQUEST.blocks[0]

    def at(*times: int, request_time: int) -> NDArray[np.float64]:
        block = (items, actions, np.array(times, dtype=np.int32))
        return rank(params, SCHEMA, replace(REQUEST, blocks=[block], request_time=request_time), settings)

    low, high = -(2**31), 2**31 - 1
    apart = at(low, low, low, low, request_time=high)
    np.testing.assert_array_equal(apart, at(0, 0, 0, 0, request_time=high))  # both lie in the last bucket


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rank_heeds_everything_it_is_given(variant: Variant, interleave: bool) -> None:
    params, settings = random_model(variant, interleave=interleave)
    answer = rank(params, SCHEMA, REQUEST, settings)
    assert answer.shape == (4, 2)
    assert np.all((answer > 0) & (answer < 1))
    items, actions, times = REQUEST.blocks[0]
    changes: list[OracleRequest] = [
        replace(REQUEST, request_time=90000),
        replace(REQUEST, user_features={"age": 0.4}),
        replace(REQUEST, context_features={"hour": 18}),
        replace(REQUEST, item_features=REQUEST.item_features | {"tags": np.array([1, 4, 7, 9])}),
        replace(REQUEST, blocks=[(items + 1, actions, times)]),
        replace(REQUEST, blocks=[(items, actions[::-1], times)]),
        replace(REQUEST, blocks=[(items, actions, times // 2)]),
        replace(REQUEST, blocks=[(items[1:], actions[1:], times[1:])]),
    ]
    for number, change in enumerate(changes):
        other = rank(params, SCHEMA, change, settings)
        assert np.all(np.abs(other - answer).max(axis=1) > 1e-9), f"change {number} changed nothing"
    np.testing.assert_array_equal(rank(params, SCHEMA, replace(REQUEST, scenario=1), settings), answer)
    for name in params:
        other = rank(params | {name: params[name] * 1.5}, SCHEMA, REQUEST, settings)
        assert np.abs(other - answer).max() > 1e-9, f"weight {name} is not read"
    for change_settings in (replace(settings, divisor=3.0), replace(settings, interleave=not interleave)):
        assert np.abs(rank(params, SCHEMA, REQUEST, change_settings) - answer).max() > 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_and_head_matters(variant: Variant) -> None:
    params, settings = random_model(variant)
    answer = rank(params, SCHEMA, REQUEST, settings)
    halves: list[Callable[[NDArray[Any]], NDArray[Any]]] = [lambda w: w[:1], lambda w: w[1:]]
    for half in halves:
        fewer = {name: half(w) if name.startswith("layers/") else w for name, w in params.items()}
        assert np.abs(rank(fewer, SCHEMA, REQUEST, settings) - answer).max() > 1e-9
    columns = params["layers/uvqk_w"].shape[2]
    for column in range(columns):
        other = params["layers/uvqk_w"].copy()
        other[:, :, column] *= 1.5
        changed = rank(params | {"layers/uvqk_w": other}, SCHEMA, REQUEST, settings)
        assert np.abs(changed - answer).max() > 1e-9, f"column {column} is not read"


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_is_normed(variant: Variant) -> None:
    # With W_o = 0 the layers add nothing, and the head reads LN of the candidate's token; small, so that eps counts.
    params, settings = random_model(variant, encoding=False)
    params = {
        name: w
        * (0 if name.startswith("layers/out_") else 0.01 if name.startswith(("item", "action", "features/")) else 1)
        for name, w in params.items()
    }
    x = params["item"][4].astype(np.float64) + params["action"][3] + params["features/item.genre"][0]
    x = x + np.float64(0.3) * params["features/user.age"][0] + params["features/context.hour"][17]
    y = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["final_scale"] + params["final_shift"]
    expected = 1 / (1 + np.exp(-logits(params, y, 4)))
    np.testing.assert_allclose(rank(params, SCHEMA, REQUEST, settings)[0], expected, rtol=1e-9)


def test_wrong_shapes_are_refused() -> None:
    params, settings = random_model("research")
    with pytest.raises(ValueError, match="reads one block; request has 2, schema 1"):
        rank(params, SCHEMA, replace(REQUEST, blocks=REQUEST.blocks * 2), settings)
    two = replace(SCHEMA, blocks=(Block("a"), Block("b")))
    with pytest.raises(ValueError, match="request has 1, schema 2"):
        rank(params, two, REQUEST, settings)
    with pytest.raises(ValueError, match=r"pos has shape \(5,\), not 2 \* 4 - 1"):
        rank(params, SCHEMA, REQUEST, replace(settings, bias_positions=4))
    with pytest.raises(ValueError, match="cannot be split"):
        rank(params, SCHEMA, REQUEST, replace(settings, dqk=4))
    with pytest.raises(ValueError, match="3 times for a history of 4 rows"):
        stack(params, np.zeros((5, 7)), settings=settings, times=np.zeros(3, int), request_time=0, history=4)
