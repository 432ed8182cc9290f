"""HSTU's row-wise kernels, paged attention and layer stacks compile for an H100; needs `make cross`, no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import serialize_executable

from flame_jax.fke.device import described_device
from flame_jax.pallas_kernels.gated_output import mosaic as gated
from flame_jax.pallas_kernels.layer_stack import mosaic as stack
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.pre_attention import mosaic as pre
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Bias, LogBias, Pages, Silu, Softmax

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / ".cross"
LAYERS, TOKENS, WIDTH = 5, 3072, 512


@cache
def sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(described_device("h100"))


def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())  # type: ignore[no-untyped-call]


def row_wise() -> list[jax.stages.Compiled]:
    """Of both kernels, with the block sizes that are taken without a measurement for many rows and for few."""

    def vectors(*names: str, size: int = WIDTH) -> dict[str, Any]:
        return {name: array(LAYERS, size, dtype=jnp.float32) for name in names}

    def before(x: jax.Array, stack: dict[str, jax.Array], tiling: pre.Tiling) -> Any:
        sizes = (WIDTH,) * 4
        return pre.pre_attention(x, stack, 3, sizes=sizes, gate_only=True, epsilon=1e-6, tiling=tiling)

    def after(o: jax.Array, u: jax.Array, x: jax.Array, stack: dict[str, jax.Array], tiling: gated.Tiling) -> Any:
        return gated.gated_output(o, u, x, stack, 4, epsilon=1e-6, first=TOKENS // 3, tiling=tiling)

    x, o = array(1, TOKENS, WIDTH), array(1, TOKENS * 2 // 3, WIDTH)
    mixing = {"uvqk_w": array(LAYERS, WIDTH, 4 * WIDTH), **vectors("uvqk_b", size=4 * WIDTH)}
    mixing |= vectors("input_scale", "input_shift")
    output = {"out_w": array(LAYERS, 3 * WIDTH, WIDTH), **vectors("output_scale", "output_shift")}
    return [
        *(
            jax.jit(before, static_argnames="tiling").lower(x, mixing, tiling=tiling).compile()
            for tiling in (pre.Tiling(), pre.Tiling(parts=4, cluster=2))
        ),
        *(
            jax.jit(after, static_argnames="tiling").lower(o, x, x, output, tiling=tiling).compile()
            for tiling in (gated.Tiling(cluster=2), gated.Tiling(columns=128, stages=5))
        ),
    ]


def with_pages(blocks: int, heads: int, dim: int, *, softmax: bool) -> jax.stages.Compiled:
    """Of attention with a log bias, or of SiLU attention; with the block sizes measured for packed rows, if any."""

    def attention(*arrays: jax.Array, history: Pages, temperature: jax.Array | None, bias: Bias | None) -> jax.Array:
        activation = Silu(dim**-0.5, 32.0) if temperature is None else Softmax(temperature)
        about: Any = {"bias": bias, "causal": not softmax, "align": 64, "window": 1024, "history": history}
        return sumi_attention(*arrays, activation=activation, implementation="mosaic", **about)

    pool, tokens = array(blocks, 40, 128, heads, dim), array(blocks, TOKENS, heads, dim)
    numbers = {"dtype": jnp.int32}
    history = Pages(pool, pool, array(8, 8, **numbers), array(blocks, 40, 128, **numbers) if softmax else None)
    arrays = tokens, tokens, tokens, array(8, 5 + blocks, **numbers), array(blocks, TOKENS, **numbers)
    temperature = array(blocks, 1, heads, dtype=jnp.float32) if softmax else None
    bias = LogBias(array(blocks, 1, heads, 3, dtype=jnp.float32)) if softmax else None
    return jax.jit(attention).lower(*arrays, history=history, temperature=temperature, bias=bias).compile()


def layer_stack(*, layers: int, whole: bool) -> jax.stages.Compiled:
    """All layers in one launch, as nothing but a GPU runs them; `whole`, with a bias and something that follows."""
    blocks, width, hidden, tokens, first = 2, 128, 512, 1024, 640
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "ffn1": (width, hidden), "ffn2": (hidden, width)}
    weights = {f"{name}_w": array(layers, blocks, *shape) for name, shape in shapes.items()}
    sizes = {f"{name}_b": shape[1] for name, shape in shapes.items()}
    sizes |= {f"norm{n}_{part}": width for n in (1, 2) for part in ("scale", "shift")}
    weights |= {name: array(layers, blocks, size, dtype=jnp.float32) for name, size in sizes.items()}
    heads = layers, blocks, 3, 2

    def run(x: jax.Array, weights: Any, rows: jax.Array, time: jax.Array, temperature: jax.Array, bias: Any) -> Any:
        following = Projection(weights["qkv_w"][:1, :1], weights["qkv_b"][:1, :1], 0) if whole else None
        return stack.layer_stack(
            x,
            weights,
            rows,
            time,
            temperature=temperature,
            coefficients=bias,
            following=following,
            first_candidate=first,
            align=64,
            window=512,
        )

    integers = (array(*shape, dtype=jnp.int32) for shape in ((8, 5 + blocks), (blocks, tokens)))
    bias = array(*heads, 3, dtype=jnp.float32) if whole else None
    operands = array(blocks, tokens, width), weights, *integers, array(*heads, dtype=jnp.float32), bias
    return jax.jit(run).lower(*operands).compile()


@pytest.mark.skipif(not (PLUGIN / "jax_plugins").is_dir(), reason="`make cross` was not run")
def test_they_compile_for_a_gpu_that_is_not_here() -> None:
    path = os.pathsep.join([str(ROOT), str(PLUGIN), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # JAX has set it in this process
    command = [sys.executable, "-m", "tests.pallas_kernels.test_mosaic_compiles"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mosaic"] * 9


if __name__ == "__main__":
    climber, hstu, wide = (2, 2, 64, True), (1, 4, 128, False), (1, 1, 256, True)
    for executable in (
        *row_wise(),
        *(with_pages(*shape, softmax=softmax) for *shape, softmax in (climber, hstu, wide)),
        layer_stack(layers=3, whole=True),
        layer_stack(layers=1, whole=False),
    ):
        assert serialize_executable.serialize(executable)[0]
        print("mosaic" if "mosaic_gpu" in str(executable.as_text()) else "none")
