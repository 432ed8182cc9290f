"""The transformer oracle against examples worked by hand from docs/models.md."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.oracles.head import logits
from tests.oracles.small import head_shapes, token_shapes
from tests.oracles.test_hstu_oracle import EMPTY, REQUEST, SCHEMA
from tests.oracles.transformer import add_positions, attention, gelu, rank, stack

Params = dict[str, NDArray[Any]]


def random_model() -> Params:
    """A small model whose every size differs: heads 2, head_dim 3, width 7, two layers."""
    rng = np.random.default_rng(11)
    H, h, D, f, L, M = 2, 3, 7, 5, 2, 4
    shapes: dict[str, tuple[int, ...]] = {
        **token_shapes(D),
        "position": (3, D),
        "layers/qkv_w": (L, D, 3 * H * h),
        "layers/qkv_b": (L, 3 * H * h),
        "layers/out_w": (L, H * h, D),
        "layers/out_b": (L, D),
        "layers/norm1_scale": (L, D),
        "layers/norm1_shift": (L, D),
        "layers/norm2_scale": (L, D),
        "layers/norm2_shift": (L, D),
        "layers/ffn1_w": (L, D, f),
        "layers/ffn1_b": (L, f),
        "layers/ffn2_w": (L, f, D),
        "layers/ffn2_b": (L, D),
        "final_scale": (D,),
        "final_shift": (D,),
        **head_shapes(M, D),
    }
    return {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_two_tokens_by_hand() -> None:
    # head_dim = 4, so products are halved. The event sees itself alone: v_0. The candidate: q_1 . k_0 = 2 ln 3, own 0,
    # so the weights are 3 : 1 and o = (3*(1, 2, 0, 0) + (-3, 4, 8, 0)) / 4 = (0, 2.5, 2, 0).
    out = attention(
        np.array([[5.0, 7.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]]),
        np.array([[math.log(3.0), 0.0, 9.0, 9.0], [-1.0, 2.0, 9.0, 9.0]]),
        np.array([[1.0, 2.0, 0.0, 0.0], [-3.0, 4.0, 8.0, 0.0]]),
        history=1,
    )
    np.testing.assert_allclose(out, [[1.0, 2.0, 0.0, 0.0], [0.0, 2.5, 2.0, 0.0]], atol=1e-12)


def test_who_sees_whom() -> None:
    # Zero queries: plain means of the values seen. History 0..2 sees all of it, a candidate that and itself.
    values = np.array([[1.0], [10.0], [100.0], [1000.0], [10000.0]])
    out = attention(np.zeros((5, 1)), np.ones((5, 1)), values, history=3)
    np.testing.assert_allclose(out[:, 0], [37.0, 37.0, 37.0, 1111 / 4, 10111 / 4], rtol=1e-12)


def test_layer_by_hand() -> None:
    # One candidate x = (1, -1), no history, head_dim 1: LN(x) = (1, -1) (to 5e-7), v = 1*2 + 0.5 = 2.5, o = v.
    # x' = (1 + 2.5 + 3, -1 - 2.5 + 3) = (6.5, -0.5), its LN (1, -1), scaled and shifted (2 + 1, -4 + 1) = (3, -3).
    # ffn1: 3 - 3*0 - 2 = 1, gelu(1) = 0.8413447; y = (6.5 + 0.8413447*10 + 1, -0.5 + 2) = (15.913447, 1.5)
    params: Params = {
        "layers/norm1_scale": np.array([[1.0, 1.0]]),
        "layers/norm1_shift": np.array([[0.0, 0.0]]),
        "layers/qkv_w": np.array([[[7.0, 8.0, 2.0], [0.0, 0.0, 0.0]]]),
        "layers/qkv_b": np.array([[0.0, 0.0, 0.5]]),
        "layers/out_w": np.array([[[1.0, -1.0]]]),
        "layers/out_b": np.array([[3.0, 3.0]]),
        "layers/norm2_scale": np.array([[2.0, 4.0]]),
        "layers/norm2_shift": np.array([[1.0, 1.0]]),
        "layers/ffn1_w": np.array([[[1.0], [0.0]]]),
        "layers/ffn1_b": np.array([[-2.0]]),
        "layers/ffn2_w": np.array([[[10.0, 0.0]]]),
        "layers/ffn2_b": np.array([[1.0, 2.0]]),
    }
    y = stack(params, np.array([[1.0, -1.0]]), heads=1, head_dim=1, history=0)
    np.testing.assert_allclose(y, [[15.913447, 1.5]], atol=2e-5)


def test_gelu() -> None:
    # Phi(1) = 0.8413447, Phi(2) = 0.9772499; by the tanh approximation gelu(2) would be 1.9545977.
    np.testing.assert_allclose(gelu(np.array([-1.0, 0.0, 1.0, 2.0])), [-0.1586553, 0, 0.8413447, 1.9544997], atol=1e-7)


def test_positions_by_hand() -> None:
    # Three history rows have reversed positions 3, 2, 1, clipped to the last row 2; candidates 0. No scaling of x.
    table = np.array([[1.0], [2.0], [3.0]]) * np.ones(4)
    out = add_positions({"position": table}, np.full((5, 4), 10.0), history=3)
    np.testing.assert_array_equal(out[:, 0], [13, 13, 12, 11, 11])
    np.testing.assert_array_equal(add_positions({}, np.ones((2, 4)), history=1), np.ones((2, 4)))


def test_history_is_whole_and_candidates_are_alone() -> None:
    params = random_model()
    x = np.random.default_rng(2).normal(size=(6, 7))
    before = stack(params, x, heads=2, head_dim=3, history=4)
    for changed_row, same in ((2, []), (4, [0, 1, 2, 3, 5])):
        changed = x.copy()
        changed[changed_row] += np.arange(7.0)
        after = stack(params, changed, heads=2, head_dim=3, history=4)
        differs = [m for m in range(6) if m not in same]
        np.testing.assert_array_equal(after[same], before[same])
        assert np.all(np.abs(after[differs] - before[differs]).max(axis=1) > 1e-9)


def test_empty_history() -> None:
    params = random_model()
    request = replace(REQUEST, blocks=[(EMPTY, EMPTY, EMPTY)])
    answer = rank(params, SCHEMA, request, heads=2, head_dim=3)
    assert answer.shape == (4, 2)
    assert np.abs(rank(params, SCHEMA, REQUEST, heads=2, head_dim=3) - answer).max() > 1e-9
    # A candidate attends to itself alone, so queries and keys play no part.
    weights = params["layers/qkv_w"].copy()
    weights[:, :, :12] = 0
    np.testing.assert_array_equal(
        rank(params | {"layers/qkv_w": weights}, SCHEMA, request, heads=2, head_dim=3), answer
    )


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("kept", [[0], [3, 1], [1, 1, 2], []])
def test_candidates_do_not_see_each_other(interleave: bool, kept: list[int]) -> None:
    params = random_model()
    everyone = rank(params, SCHEMA, REQUEST, heads=2, head_dim=3, interleave=interleave)
    fewer = replace(
        REQUEST,
        candidates=REQUEST.candidates[kept],
        item_features={name: values[kept] for name, values in REQUEST.item_features.items()},
    )
    answer = rank(params, SCHEMA, fewer, heads=2, head_dim=3, interleave=interleave)
    np.testing.assert_allclose(answer, everyone[kept], rtol=1e-12)


@pytest.mark.parametrize("interleave", [False, True])
def test_rank_heeds_everything_it_is_given(interleave: bool) -> None:
    params = random_model()
    answer = rank(params, SCHEMA, REQUEST, heads=2, head_dim=3, interleave=interleave)
    assert np.all((answer > 0) & (answer < 1))
    items, actions, times = REQUEST.blocks[0]
    changes = [
        replace(REQUEST, user_features={"age": 0.4}),
        replace(REQUEST, context_features={"hour": 18}),
        replace(REQUEST, item_features=REQUEST.item_features | {"tags": np.array([1, 4, 7, 9])}),
        replace(REQUEST, blocks=[(items + 1, actions, times)]),
        replace(REQUEST, blocks=[(items, actions[::-1], times)]),
        replace(REQUEST, blocks=[(items[1:], actions[1:], times[1:])]),
    ]
    for number, change in enumerate(changes):
        other = rank(params, SCHEMA, change, heads=2, head_dim=3, interleave=interleave)
        assert np.all(np.abs(other - answer).max(axis=1) > 1e-9), f"change {number} changed nothing"
    # Neither the times nor the scenario are read.
    for change in (
        replace(REQUEST, blocks=[(items, actions, times + 1)]),
        replace(REQUEST, request_time=90000, scenario=1),
    ):
        other = rank(params, SCHEMA, change, heads=2, head_dim=3, interleave=interleave)
        np.testing.assert_array_equal(other, answer)
    for name in params:
        other = rank(params | {name: params[name] * 1.5}, SCHEMA, REQUEST, heads=2, head_dim=3, interleave=interleave)
        assert np.abs(other - answer).max() > 1e-9, f"weight {name} is not read"
    other = rank(params, SCHEMA, REQUEST, heads=2, head_dim=3, interleave=not interleave)
    assert np.abs(other - answer).max() > 1e-9


def test_output_is_normed() -> None:
    # With layers that add nothing, the head reads LN of the candidate's token and position; small, so that eps counts.
    small = ("item", "action", "features/", "position")
    params = {
        name: w * (0 if name.startswith(("layers/out_", "layers/ffn2_")) else 0.01 if name.startswith(small) else 1)
        for name, w in random_model().items()
    }
    x = params["item"][4].astype(np.float64) + params["action"][3] + params["features/item.genre"][0]
    x = x + np.float64(0.3) * params["features/user.age"][0] + params["features/context.hour"][17]
    x = x + params["position"][0]
    y = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["final_scale"] + params["final_shift"]
    expected = 1 / (1 + np.exp(-logits(params, y, 4)))
    np.testing.assert_allclose(rank(params, SCHEMA, REQUEST, heads=2, head_dim=3)[0], expected, rtol=1e-9)


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="reads one block; request has 2, schema 1"):
        rank(random_model(), SCHEMA, replace(REQUEST, blocks=REQUEST.blocks * 2), heads=2, head_dim=3)
