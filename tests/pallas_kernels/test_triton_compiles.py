"""The Triton kernel compiles for an H100; needs jax-triton and the CUDA plugin (`make cross`), no GPU and no CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import serialize_executable

from flame_jax.fke.device import described_device
from flame_jax.pallas_kernels.sumi_attention.types import Bias, LogBias, Pages, Silu, Softmax, TableBias

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / ".cross"
BLOCKS, TOKENS, REQUESTS, SCENARIOS = 2, 1024, 8, 2


class Case(NamedTuple):
    """One kernel; dimensions are (qk, v)."""

    softmax: bool
    bias: Literal["none", "log", "table"]
    causal: bool
    heads: int
    dimensions: tuple[int, int]
    queries: int = TOKENS


CASES = {
    "softmax with a log bias": Case(True, "log", False, 2, (64, 64)),
    "causal silu": Case(False, "none", True, 4, (128, 128)),
    "causal silu with a table bias": Case(False, "table", True, 4, (128, 128)),
    "candidates only": Case(True, "log", False, 2, (64, 64), queries=256),
    "dimensions that differ": Case(True, "table", True, 1, (32, 256)),
}


def compiled(case: Case) -> str:
    """The HLO of one case's executable for an H100, which can be serialised."""
    from flame_jax.pallas_kernels.sumi_attention.triton import sumi_attention

    sharding = jax.sharding.SingleDeviceSharding(described_device("h100"))

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]

    def attention(arrays: list[jax.Array], temperature: jax.Array | None, bias: Bias | None) -> jax.Array:
        activation = Silu(case.dimensions[0] ** -0.5, 512.0) if temperature is None else Softmax(temperature)
        return sumi_attention(
            *arrays, activation=activation, bias=bias, causal=case.causal, align=64, compute_capability=90
        )

    qk_dim, v_dim = case.dimensions
    arrays = [
        array(BLOCKS, case.queries, case.heads, qk_dim, dtype=jnp.bfloat16),
        array(BLOCKS, TOKENS, case.heads, qk_dim, dtype=jnp.bfloat16),
        array(BLOCKS, TOKENS, case.heads, v_dim, dtype=jnp.bfloat16),
        array(REQUESTS, 5 + BLOCKS, dtype=jnp.int32),
        array(BLOCKS, TOKENS, dtype=jnp.int32),
    ]
    per_head = (BLOCKS, SCENARIOS, case.heads)
    biases = {"none": None, "log": LogBias(array(*per_head, 3)), "table": TableBias(array(511), array(64))}
    temperature = array(*per_head) if case.softmax else None
    executable = jax.jit(attention).lower(arrays, temperature, biases[case.bias]).compile()
    assert serialize_executable.serialize(executable)[0]
    return str(executable.as_text())


@pytest.mark.skipif(not (PLUGIN / "jax_plugins").is_dir(), reason="`make cross` was not run")
@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed")
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(name: str) -> None:
    path = os.pathsep.join([str(ROOT), str(PLUGIN), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # JAX has set it in this process
    command = [sys.executable, "-m", "tests.pallas_kernels.test_triton_compiles", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('custom_call_target="triton_kernel_call_ffi"') == 1


def test_a_history_in_pages_is_refused() -> None:
    pytest.importorskip("jax_triton")
    from flame_jax.pallas_kernels.sumi_attention.triton import sumi_attention

    x, rows = jnp.zeros((1, 64, 1, 64), jnp.bfloat16), jnp.zeros((1, 6), jnp.int32)
    pool = jnp.zeros((1, 1, 64, 1, 64), jnp.bfloat16)
    history = Pages(pool, pool, jnp.zeros((1, 1), jnp.int32))
    about: dict[str, Any] = {"bias": None, "causal": True, "align": 64, "history": history}
    with pytest.raises(ValueError, match="not for Triton"):
        sumi_attention(x, x, x, rows, jnp.zeros((1, 64), jnp.int32), activation=Silu(1, 1), **about)


if __name__ == "__main__":
    print(compiled(CASES[sys.argv[1]]))
