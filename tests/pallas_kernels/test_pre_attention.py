"""The row-wise part of an HSTU layer before its attention against float64, every implementation alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.pallas_kernels import items, tuned
from flame_jax.pallas_kernels.pre_attention import mosaic
from flame_jax.pallas_kernels.pre_attention.api import pre_attention

LAYERS, WIDTH, SIZES, EPSILON = 2, 128, (128, 128, 128, 128), 1e-6
TILING = mosaic.Tiling(warpgroups=2, chunk=128, stages=3, pieces=2)
Weights = dict[str, np.ndarray]


def weights(random: np.random.Generator, width: int = WIDTH, columns: int = sum(SIZES)) -> Weights:
    """Matrices that bfloat16 holds exactly."""
    matrix = random.normal(size=(LAYERS, width, columns)) * width**-0.5
    return {
        "uvqk_w": np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float32),
        "uvqk_b": random.normal(size=(LAYERS, columns)).astype(np.float32),
        "input_scale": (1 + 0.1 * random.normal(size=(LAYERS, width))).astype(np.float32),
        "input_shift": (0.1 * random.normal(size=(LAYERS, width))).astype(np.float32),
    }


def rows(random: np.random.Generator, count: int, width: int = WIDTH, mean: float = 0.0) -> np.ndarray:
    """[1, count, width] that bfloat16 holds exactly."""
    return np.asarray(jnp.asarray(mean + random.normal(size=(1, count, width)), jnp.bfloat16), np.float32)


def expected(x: np.ndarray, stack: Weights, layer: int, activated: int) -> np.ndarray:
    """u, v, q and k side by side."""
    own = {name: w[layer].astype(np.float64) for name, w in stack.items()}
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    if "input_scale" in own:
        normed = normed * own["input_scale"] + own["input_shift"]
    mixed = normed @ own["uvqk_w"] + own.get("uvqk_b", 0.0)
    at = np.arange(mixed.shape[-1])
    right: np.ndarray = np.where(at < activated, mixed / (1 + np.exp(-mixed)), mixed)
    return right


def run(
    x: np.ndarray, stack: Weights, layer: int = 0, *, tiling: mosaic.Tiling | None = TILING, **changed: Any
) -> list[np.ndarray]:
    """Of the interpreted kernel, or without a tiling of the reference, which is told to be as exact as it can."""
    dtype = jnp.bfloat16 if tiling else jnp.float32
    arguments = {"sizes": SIZES, "gate_only": True, "epsilon": EPSILON} | changed
    function: Any = partial(mosaic.pre_attention, tiling=tiling, interpret=True) if tiling else pre_attention
    on_device = {name: jnp.asarray(w) for name, w in stack.items()}
    with jax.default_matmul_precision("highest"):
        found = function(jnp.asarray(x, dtype), on_device, layer, **arguments)
    assert all(y.dtype == dtype for y in found)
    return [np.asarray(y, np.float32) for y in found]


def assert_matches(found: list[np.ndarray], right: np.ndarray, sizes: tuple[int, ...], tolerance: float) -> None:
    assert tuple(y.shape[-1] for y in found) == sizes
    np.testing.assert_allclose(np.concatenate(found, axis=-1), right, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tiling", "tolerance"), [(None, 1e-5), (TILING, 0.04)], ids=["xla", "mosaic"])
@pytest.mark.parametrize(("gate_only", "layer", "count"), [(True, 0, 192), (False, 1, 64)])
def test_it_matches_the_oracle(
    tiling: mosaic.Tiling | None, tolerance: float, gate_only: bool, layer: int, count: int
) -> None:
    random = np.random.default_rng(count)
    stack, x = weights(random), rows(random, count, mean=0.5)
    found = run(x, stack, layer, tiling=tiling, gate_only=gate_only)
    assert_matches(found, expected(x, stack, layer, SIZES[0] if gate_only else sum(SIZES)), SIZES, tolerance)


def test_a_norm_without_weights_is_the_references_alone() -> None:
    random = np.random.default_rng(0)
    stack, x = {"uvqk_w": weights(random)["uvqk_w"]}, rows(random, 5)
    assert_matches(run(x, stack, tiling=None, gate_only=False), expected(x, stack, 0, sum(SIZES)), SIZES, 1e-5)
    with pytest.raises(ValueError, match="the norm has no weights"):
        run(x, stack)


@given(st.data())
@settings(max_examples=3)
def test_every_way_to_cut_the_work_gives_the_oracles_numbers(data: st.DataObject) -> None:
    chunk = data.draw(st.sampled_from([64, 128]))
    warpgroups, cluster = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    tiling = mosaic.Tiling(
        warpgroups=warpgroups,
        chunk=chunk,
        stages=data.draw(st.integers(2, 5)),
        pieces=data.draw(st.integers(1, 4)),
        parts=data.draw(st.sampled_from([1, 2])),
        cluster=cluster,
    )
    sizes = data.draw(st.sampled_from([(64, 64, 128, 128), (128, 128, 64, 64)])) if chunk == 64 else SIZES
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    stack, x = weights(random, columns=sum(sizes)), rows(random, 64 * data.draw(st.integers(1, 4)))
    with pytest.MonkeyPatch.context() as patch:  # so that a thread block has several items
        patch.setattr(items, "MULTIPROCESSORS", data.draw(st.integers(1, 3)))
        jax.clear_caches()  # type: ignore[no-untyped-call]
        found = run(x, stack, tiling=tiling, sizes=sizes)
    assert_matches(found, expected(x, stack, 0, sizes[0]), sizes, 0.04)


def test_rows_are_their_own() -> None:
    random = np.random.default_rng(1)
    stack, x = weights(random), rows(random, 192)
    dirty = x.copy()
    dirty[0, 70] = np.nan
    for clean, found in zip(run(x, stack), run(dirty, stack), strict=True):
        assert np.isnan(found[0, 70]).all()
        np.testing.assert_array_equal(np.delete(found[0], 70, axis=0), np.delete(clean[0], 70, axis=0))
    for here, there in zip(run(x, stack), run(np.roll(x, 64, axis=1), stack), strict=True):
        np.testing.assert_array_equal(np.roll(here, 64, axis=1), there)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"width": 96}, "width is 96"),
        ({"width": 576}, "width is 576"),
        ({"sizes": (128, 128, 96, 96)}, "128, 128, 96, 96 columns"),
        ({"rows": 16}, "16 rows are no multiple"),
        ({"plain": True}, "no weights"),
    ],
)
def test_what_the_kernel_can_not_do_is_said(changed: dict[str, Any], reason: str) -> None:
    able = {"dtype": jnp.bfloat16, "width": 512, "sizes": (512,) * 4, "rows": 64, "plain": False}
    assert not mosaic.misfit(**able)
    assert reason in mosaic.misfit(**able | changed)


@pytest.mark.parametrize(
    ("count", "tiling"),
    [(98304, mosaic.Tiling()), (3072, mosaic.Tiling(parts=4))],
)
def test_without_a_measurement_few_multiprocessors_are_idle(
    count: int, tiling: mosaic.Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "best", lambda *_: None)
    assert mosaic.tiling_for({"width": 512, "sizes": [512] * 4}, count) == tiling
