"""The row-wise rest of a post-norm layer against the float64 oracle, every implementation alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flame_jax.pallas_kernels.post_attention import mosaic
from flame_jax.pallas_kernels.post_attention.api import post_attention
from flame_jax.pallas_kernels.post_attention.mosaic_form import Tiling
from flame_jax.pallas_kernels.post_attention.types import Projection
from tests.oracles import climber as oracle

LAYERS, BLOCKS, WIDTH, FFN = 2, 2, 64, 128
MOSAIC = partial(mosaic.post_attention, interpret=True)


def weights(random: np.random.Generator, inner: int, width: int = WIDTH, ffn: int = FFN) -> dict[str, np.ndarray]:
    """Matrices that bfloat16 holds exactly."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = random.normal(size=(LAYERS, BLOCKS, rows, columns)) * rows**-0.5
        return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)

    def vector(size: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.1 * random.normal(size=(LAYERS, BLOCKS, size))).astype(np.float32)

    shapes = {"qkv": (width, 3 * inner), "out": (inner, width), "ffn1": (width, ffn), "ffn2": (ffn, width)}
    found = {f"{name}_w": matrix(*shape) for name, shape in shapes.items()}
    found |= {f"{name}_b": vector(columns) for name, (_, columns) in shapes.items()}
    for norm in ("norm1", "norm2"):
        found |= {f"{norm}_scale": vector(width, 1.0), f"{norm}_shift": vector(width)}
    return found


def expected(attended: np.ndarray, x: np.ndarray, own: dict[str, np.ndarray]) -> np.ndarray:
    """One block's rows, by the oracle's pieces."""
    w = {name: value.astype(np.float64) for name, value in own.items()}

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        return np.stack([oracle.layer_norm(row, w[f"{name}_scale"], w[f"{name}_shift"]) for row in y])

    y = norm(x + attended @ w["out_w"] + w["out_b"], "norm1")
    hidden = oracle.relu(y @ w["ffn1_w"] + w["ffn1_b"])
    return norm(y + hidden @ w["ffn2_w"] + w["ffn2_b"], "norm2")


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"), [("xla", jnp.float32, 1e-5), ("mosaic", jnp.bfloat16, 0.04)]
)
@pytest.mark.parametrize(("rows", "inner", "layer"), [(192, 64, 0), (64, 128, 1)])
def test_it_matches_the_oracle_and_projects_for_the_layer_after(
    implementation: str, dtype: Any, tolerance: float, rows: int, inner: int, layer: int
) -> None:
    random = np.random.default_rng(rows)
    w = weights(random, inner)
    attended, x = (
        np.asarray(jnp.asarray(random.normal(size=(BLOCKS, rows, n)), dtype), np.float32) for n in (inner, WIDTH)
    )
    run = MOSAIC if implementation == "mosaic" else post_attention
    given = {name: jnp.asarray(v) for name, v in w.items()}
    following = Projection(given["qkv_w"], given["qkv_b"], 1) if layer == 0 else None
    found = run(jnp.asarray(attended, dtype), jnp.asarray(x, dtype), given, layer, following=following)
    assert len(found) == (4 if layer == 0 else 1)
    for block in range(BLOCKS):
        y = expected(attended[block], x[block], {name: v[layer, block] for name, v in w.items()})
        np.testing.assert_allclose(np.asarray(found[0][block], np.float32), y, rtol=0, atol=tolerance)
        if len(found) > 1:
            mixed = y @ w["qkv_w"][layer + 1, block] + w["qkv_b"][layer + 1, block]
            for mine, theirs in zip(found[1:], np.split(mixed, 3, axis=-1), strict=True):
                np.testing.assert_allclose(np.asarray(mine[block], np.float32), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tiling", [Tiling(1, 64, 2), Tiling(3, 64, 3), Tiling(2, 128, 2)], ids=str)
def test_more_tiles_than_workers_with_weights_that_blocks_share(
    tiling: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 2)  # one worker for each block
    random = np.random.default_rng(3)
    shared = {name: jnp.asarray(v[:, :1]) for name, v in weights(random, 128, width=128, ffn=256).items()}
    attended, x = (jnp.asarray(random.normal(size=(BLOCKS, 320, 128)), jnp.bfloat16) for _ in range(2))
    following = Projection(shared["qkv_w"], shared["qkv_b"], 1)
    found = MOSAIC(attended, x, shared, 0, following, tiling=tiling)
    wide = (attended.astype(jnp.float32), x.astype(jnp.float32))
    for mine, theirs in zip(found, post_attention(*wide, shared, 0, following=following), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), theirs, rtol=0, atol=0.04)


def test_rows_that_are_keys_only_in_the_layer_after_have_no_output() -> None:
    random = np.random.default_rng(4)
    w = {name: jnp.asarray(v) for name, v in weights(random, 64).items()}
    attended, x = (jnp.asarray(random.normal(size=(BLOCKS, 320, 64)), jnp.bfloat16) for _ in range(2))
    for run in (MOSAIC, post_attention):
        whole = run(attended, x, w, 0, following=Projection(w["qkv_w"], w["qkv_b"], 1))
        found = run(attended, x, w, 0, following=Projection(w["qkv_w"], w["qkv_b"], 1, first=192))
        for mine, first, theirs in zip(found, (192, 192, 0, 0), whole, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs[:, first:]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"width": 96}, "width is 96"),
        ({"inner": 256}, "256 dimensions"),
        ({"hidden": 100}, "100 are no multiple"),
        ({"rows": 16}, "16 rows are no multiple"),
    ],
)
def test_what_the_kernel_can_not_do_is_said(changed: dict[str, Any], reason: str) -> None:
    able = {"dtype": jnp.bfloat16, "width": 128, "inner": 128, "hidden": 512, "rows": 64}
    assert not mosaic.misfit(**able)
    assert reason in mosaic.misfit(**able | changed)


def test_a_kernel_without_dropout_refuses_it() -> None:
    random = np.random.default_rng(0)
    x, w = jnp.zeros((BLOCKS, 64, 64), jnp.bfloat16), {n: jnp.asarray(v) for n, v in weights(random, 64).items()}
    with pytest.raises(ValueError, match="no dropout"):
        post_attention(x, x, w, 0, drop=lambda y: y * 0.5, implementation="mosaic")


def test_a_rows_bits_do_not_depend_on_where_it_lies() -> None:
    random = np.random.default_rng(1)
    w = {name: jnp.asarray(v) for name, v in weights(random, 64).items()}
    x = jnp.asarray(random.normal(size=(BLOCKS, 192, 64)), jnp.bfloat16)
    moved = jnp.roll(x, 64, axis=1)
    following = Projection(w["qkv_w"], w["qkv_b"], 1)
    for here, there in zip(MOSAIC(x, x, w, 0, following), MOSAIC(moved, moved, w, 0, following), strict=True):
        assert (jax.device_get(jnp.roll(here, 64, axis=1)) == jax.device_get(there)).all()
