"""An STU state dict as a function, against the float64 stack."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.models.hstu import stack_from_meta
from flame_jax.models.meta_stu import layers_from_meta
from tests.oracles import hstu

WIDTH, HEADS, DQK, DV, DEPTH, DIVISOR = 12, 2, 4, 6, 2, 30


def make_state(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "_uvqk_weight": (WIDTH, 2 * HEADS * (DV + DQK)),
        "_uvqk_beta": (2 * HEADS * (DV + DQK),),
        "_input_norm_weight": (WIDTH,),
        "_input_norm_bias": (WIDTH,),
        "_output_weight": (3 * HEADS * DV, WIDTH),
        "_output_norm_weight": (HEADS * DV,),
        "_output_norm_bias": (HEADS * DV,),
    }
    return {
        f"_stu_layers.{i}.{name}": random.normal(scale=0.5, size=shape).astype(np.float32)
        for i in range(DEPTH)
        for name, shape in shapes.items()
    }


STATE = make_state()
SIZES = {"num_heads": HEADS, "attention_dim": DQK, "hidden_dim": DV}
STACK = stack_from_meta(STATE, num_heads=HEADS, attention_dim=DQK, hidden_dim=DV, max_seq_len=DIVISOR, dtype="float32")


def oracle(x: np.ndarray, history: int) -> np.ndarray:
    names = {
        "uvqk_w": "_uvqk_weight",
        "uvqk_b": "_uvqk_beta",
        "input_scale": "_input_norm_weight",
        "input_shift": "_input_norm_bias",
        "out_w": "_output_weight",
        "output_scale": "_output_norm_weight",
        "output_shift": "_output_norm_bias",
    }
    params = {
        f"layers/{ours}": np.stack([STATE[f"_stu_layers.{i}.{theirs}"] for i in range(DEPTH)])
        for ours, theirs in names.items()
    }
    about = hstu.Settings("dlrm_v3", HEADS, DQK, DV, float(DIVISOR))
    return hstu.stack(params, x, settings=about, times=np.zeros(history, np.int64), request_time=0, history=history)


@settings(max_examples=10)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_segments_anywhere_give_the_stacks_output(shapes: list[tuple[int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    pieces = [(request, part, size) for request, sizes in enumerate(shapes) for part, size in enumerate(sizes)]
    segments, at = np.zeros((len(shapes), 4), np.int32), 3
    for position in random.permutation(len(pieces)):
        request, part, size = pieces[position]
        segments[request, 2 * part : 2 * part + 2] = (at, size)
        at += size + int(random.integers(0, 3))
    x = random.normal(size=(at + 2, WIDTH)).astype(np.float32)
    out = np.asarray(STACK(x, segments))
    covered = np.zeros(len(x), bool)
    for history_start, history, candidate_start, candidates in segments:
        rows = np.concatenate(
            [
                np.arange(history_start, history_start + history),
                np.arange(candidate_start, candidate_start + candidates),
            ]
        )
        covered[rows] = True
        np.testing.assert_allclose(out[rows], oracle(x[rows], int(history)), rtol=1e-4, atol=1e-4)
    assert not out[~covered].any()


def test_a_state_that_does_not_fit_is_refused_with_every_name() -> None:
    state = dict(STATE)
    del state["_stu_layers.1._uvqk_beta"]
    state["_stu_layers.0._more"] = np.zeros(3, np.float32)
    state["_stu_layers.0._output_weight"] = state["_stu_layers.0._output_weight"].T
    with pytest.raises(ValueError) as caught:
        layers_from_meta(state, **SIZES)
    for part in ("missing _stu_layers.1._uvqk_beta", "extra _stu_layers.0._more", "_stu_layers.0._output_weight is"):
        assert part in str(caught.value)


@pytest.mark.parametrize("segments", [[[0, 4, 3, 2]], [[0, 4, 8, 9]], [[-1, 4, 8, 1]]])
def test_segments_that_overlap_or_leave_x_are_refused(segments: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="segments"):
        STACK(np.zeros((10, WIDTH), np.float32), np.array(segments, np.int32))


def test_the_stack_may_lie_anywhere_but_only_once() -> None:
    whole = {f"_hstu_transducer._stu_module.{name}": value for name, value in STATE.items()}
    found, expected = layers_from_meta(whole, **SIZES), layers_from_meta(STATE, **SIZES)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match=r"_hstu_transducer\._stu_module\._stu_layers and other\._stu_layers"):
        layers_from_meta(whole | {f"other.{name}": value for name, value in STATE.items()}, **SIZES)
