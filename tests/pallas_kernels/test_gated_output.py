"""The row-wise part of an HSTU layer after its attention against float64, every implementation alike."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.pallas_kernels import items, tuned
from flame_jax.pallas_kernels.gated_output import mosaic
from flame_jax.pallas_kernels.gated_output.api import gated_output

LAYERS, WIDTH, VALUES, EPSILON = 2, 128, 128, 1e-6
TILING = mosaic.Tiling(warpgroups=2, columns=128, stages=3, pieces=4)
Arrays = dict[str, np.ndarray]


class Rows(NamedTuple):
    o: np.ndarray
    u: np.ndarray
    x: np.ndarray


def exact(values: np.ndarray) -> np.ndarray:
    """Rounded to what bfloat16 holds."""
    return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)


def weights(random: np.random.Generator, values: int = VALUES, width: int = WIDTH, *, whole: bool = True) -> Arrays:
    """Of two layers."""
    inputs = 3 * values if whole else values
    return {
        "out_w": exact(random.normal(size=(LAYERS, inputs, width)) * inputs**-0.5),
        "output_scale": (1 + 0.1 * random.normal(size=(LAYERS, values))).astype(np.float32),
        "output_shift": (0.1 * random.normal(size=(LAYERS, values))).astype(np.float32),
    }


def rows(random: np.random.Generator, count: int, first: int = 0, values: int = VALUES, width: int = WIDTH) -> Rows:
    """o's mean is not 0, and its first columns are unlike the last."""
    o = 2 + random.normal(size=(1, count - first, values)) * np.linspace(0.1, 3, values)
    u, x = (exact(random.normal(size=(1, count, n))) for n in (values, width))
    return Rows(exact(o), u, x)


def expected(arrays: Rows, stack: Arrays, layer: int) -> np.ndarray:
    own = {name: w[layer].astype(np.float64) for name, w in stack.items()}
    o, u, x = (y.astype(np.float64)[:, -arrays.o.shape[1] :] for y in arrays)
    centred = o - o.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    if "output_scale" in own:
        normed = normed * own["output_scale"] + own["output_shift"]
    gated = u * normed
    if len(own["out_w"]) != gated.shape[-1]:
        gated = np.concatenate([u, o, gated], axis=-1)
    y: np.ndarray = x + gated @ own["out_w"] + own.get("out_b", 0.0)
    return y


def run(
    arrays: Rows,
    stack: Arrays,
    layer: int = 0,
    *,
    tiling: mosaic.Tiling | None = TILING,
    **changed: Any,
) -> np.ndarray:
    """Of the interpreted kernel, or without a tiling of the reference, which is told to be as exact as it can."""
    dtype = jnp.bfloat16 if tiling else jnp.float32
    function: Any = partial(mosaic.gated_output, tiling=tiling, interpret=True) if tiling else gated_output
    on_device = {name: jnp.asarray(w) for name, w in stack.items()}
    with jax.default_matmul_precision("highest"):
        found = function(*(jnp.asarray(y, dtype) for y in arrays), on_device, layer, epsilon=EPSILON, **changed)
    assert found.dtype == dtype
    return np.asarray(found, np.float32)


@pytest.mark.parametrize(("tiling", "tolerance"), [(None, 2e-5), (TILING, 0.05)], ids=["xla", "mosaic"])
@pytest.mark.parametrize(("whole", "layer", "count", "first"), [(True, 0, 192, 0), (False, 1, 192, 64)])
def test_it_matches_the_oracle(
    tiling: mosaic.Tiling | None, tolerance: float, whole: bool, layer: int, count: int, first: int
) -> None:
    random = np.random.default_rng(count)
    stack, arrays = weights(random, whole=whole), rows(random, count, first)
    found = run(arrays, stack, layer, tiling=tiling, first=first)
    np.testing.assert_allclose(found, expected(arrays, stack, layer), rtol=0, atol=tolerance)


def test_a_norm_without_weights_and_a_bias_are_the_references_alone() -> None:
    random = np.random.default_rng(0)
    stack, arrays = {"out_w": weights(random, whole=False)["out_w"]}, rows(random, 5)
    stack["out_b"] = random.normal(size=(LAYERS, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(run(arrays, stack, tiling=None), expected(arrays, stack, 0), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="the norm has no weights"):
        run(arrays, stack)


@given(st.data())
@settings(max_examples=3)
def test_every_way_to_cut_the_work_gives_the_oracles_numbers(data: st.DataObject) -> None:
    warpgroups, cluster = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    tiling = mosaic.Tiling(
        warpgroups=warpgroups,
        columns=data.draw(st.sampled_from([64, 128])),
        stages=data.draw(st.integers(2, 4)),
        pieces=data.draw(st.integers(2, 4)),
        cluster=cluster,
    )
    random, count = np.random.default_rng(data.draw(st.integers(0, 9))), 64 * data.draw(st.integers(2, 4))
    whole, values, first = data.draw(st.booleans()), data.draw(st.sampled_from([64, 192])), data.draw(st.integers(0, 1))
    stack, arrays = weights(random, values, whole=whole), rows(random, count, first * 64, values)
    with pytest.MonkeyPatch.context() as patch:  # so that a thread block has several items
        patch.setattr(items, "MULTIPROCESSORS", data.draw(st.integers(1, 3)))
        jax.clear_caches()  # type: ignore[no-untyped-call]
        found = run(arrays, stack, tiling=tiling, first=first * 64)
    np.testing.assert_allclose(found, expected(arrays, stack, 0), rtol=0, atol=0.05)


@pytest.mark.parametrize("dirty", [0, 1, 2], ids=["o", "u", "x"])
def test_rows_are_their_own(dirty: int) -> None:
    random = np.random.default_rng(1)
    stack, arrays = weights(random), rows(random, 128)
    clean = run(arrays, stack)
    arrays[dirty][0, 70] = np.nan
    found = run(arrays, stack)
    assert np.isnan(found[0, 70]).all()
    np.testing.assert_array_equal(np.delete(found[0], 70, axis=0), np.delete(clean[0], 70, axis=0))


def test_a_rows_bits_do_not_depend_on_where_it_lies() -> None:
    random = np.random.default_rng(2)
    stack, arrays = weights(random), rows(random, 192)
    moved = Rows(*(np.roll(y, 64, axis=1) for y in arrays))
    np.testing.assert_array_equal(np.roll(run(arrays, stack), 64, axis=1), run(moved, stack))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"width": 96}, "width is 96"),
        ({"values": 96}, "have 96 values"),
        ({"rows": 16}, "16 rows are no multiple"),
        ({"plain": True}, "no weights"),
    ],
)
def test_what_the_kernel_can_not_do_is_said(changed: dict[str, Any], reason: str) -> None:
    able = {"dtype": jnp.bfloat16, "width": 512, "values": 512, "rows": 64, "plain": False}
    assert not mosaic.misfit(**able)
    assert reason in mosaic.misfit(**able | changed)


def test_a_kernel_without_dropout_refuses_it() -> None:
    random = np.random.default_rng(0)
    stack = {name: jnp.asarray(w) for name, w in weights(random).items()}
    o, u, x = (jnp.asarray(y, jnp.bfloat16) for y in rows(random, 64))
    with pytest.raises(ValueError, match="no dropout"):
        gated_output(o, u, x, stack, 0, epsilon=EPSILON, drop=lambda y: y * 0.5, implementation="mosaic")


@pytest.mark.parametrize(
    ("width", "count", "columns"), [(512, 98304, 256), (512, 3072, 128), (192, 98304, 64), (128, 64, 128)]
)
def test_without_a_measurement_few_multiprocessors_are_idle(
    width: int, count: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "best", lambda *_: None)
    assert mosaic.tiling_for({"width": width, "values": 512, "whole": True}, count).columns == columns
