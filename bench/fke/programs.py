"""Attention alone as programs to time: the engine's on packed batches, and baselines on the same requests side by side.

A program is a chain of calls, each on the last one's output, because launching takes longer than a small kernel. What a
forward pass does once for all of its layers (the list of jobs, the logs of distances) is done once per chain, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.baselines.attention import Attention, Bias, Flash, FlashMasked, masked_bias
from bench.baselines.dense import bias_logs
from bench.fke.cases import NOW, AttentionCase, inputs
from bench.threads import together
from bench.timing import side_by_side
from flame_jax.packing import Bucket, Extent, place
from flame_jax.pallas_kernels.kernels import Implementation
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Softmax

CHAIN = 8
"""Calls in a program: a launch alone takes longer than a small kernel."""
SMALL, LONG_CHAIN = 16384, 48
"""Token rows of all blocks up to which even a chain is launched more slowly than it runs, and calls for so few."""


class Program(NamedTuple):
    """A function of so many calls to compile, and its operands on the device."""

    function: Callable[..., jax.Array]
    operands: tuple[Any, ...]
    calls: int


Maker = Callable[[], Program]
"""Making operands compiles, too, and so is left to threads."""


def timed(makers: Mapping[Any, Maker], progress: Callable[[str], None]) -> tuple[dict[Any, float], dict[Any, str]]:
    """Milliseconds of a call by name; and what failed, in words, told as well."""
    made, failed = together({name: partial(_compiled, make) for name, make in makers.items()})
    for name, error in failed.items():
        progress(f"{name} failed: {error}")
    milliseconds = side_by_side({name: launch for name, (launch, _) in made.items()}, rounds=5, seconds=0.05)
    return {name: ms / made[name][1] for name, ms in milliseconds.items()}, failed


def _compiled(make: Maker) -> tuple[Callable[[], jax.Array], int]:
    function, operands, calls = make()
    return partial(jax.jit(function).lower(*operands).compile(), *operands), calls


def chain(case: AttentionCase) -> int:
    """Calls of a program for this case."""
    return LONG_CHAIN if case.blocks * case.bucket.tokens <= SMALL else CHAIN


def packed(
    case: AttentionCase,
    implementation: Implementation,
    *,
    calls: int = 0,
    held: Sequence[Extent] | None = None,
    bucket: Bucket | None = None,
) -> Program:
    """The engine's attention.

    Args:
        calls: in place of `chain`.
        held: what the requests hold, where the case's extents are padded.
        bucket: in place of the smallest one.
    """
    arrays, activation, bias = inputs(case, held=held, bucket=bucket)
    calls = calls or chain(case)
    settings: dict[str, Any] = {
        "causal": not case.softmax,
        "align": case.align,
        "window": max(case.layout.aligned(extent.history) for extent in case.extents),
        "implementation": implementation,
    }
    weights = (activation, bias) if isinstance(activation, Softmax) else ()

    def run(arrays: tuple[jax.Array, ...], weights: tuple[Any, ...]) -> jax.Array:
        q, *rest = arrays
        chosen, added = weights or (activation, None)
        for _ in range(calls):
            q = sumi_attention(q, *rest, activation=chosen, bias=added, **settings)
        return q

    return Program(run, (arrays, weights), calls)


class Regular(NamedTuple):
    """The same requests side by side, all of one extent.

    Attributes:
        q, k, v: [blocks, B, h + c, heads, dim].
        bias: of a layer.
        rows: int[B, h + c], where they lie in the packed batch.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: Bias
    rows: np.ndarray


def regular(case: AttentionCase, *, every_key: bool) -> Regular:
    """Of a case with softmax, whose requests are alike.

    Args:
        every_key: see `attention.Attention`.
    """
    (q, k, v, _, time), activation, bias = inputs(case)
    assert isinstance(activation, Softmax)
    assert isinstance(bias, LogBias)
    history, candidates = case.extents[0]
    count, tokens = len(case.extents), history + candidates
    rows = np.stack(
        [
            np.concatenate([where.history_start + np.arange(history), where.candidate_start + np.arange(candidates)])
            for where in place(case.extents, case.bucket, case.layout)
        ]
    )
    asked = jnp.full(count, NOW, jnp.int32)
    distance, age = bias_logs(time[:, rows[:, :history]], asked, tokens, every_key=every_key, dtype=q.dtype)
    inverse = jnp.broadcast_to(1 / activation.temperature, (case.blocks, count, case.heads))
    coefficients = jnp.broadcast_to(bias.coefficients, (*inverse.shape, 3))
    return Regular(q[:, rows], k[:, rows], v[:, rows], Bias(distance, age, coefficients, inverse, history), rows)


def biased(case: AttentionCase, attend: Attention, calls: int = 0) -> Program:
    """A baseline that makes each layer's bias from the logs, as it has to in a model."""
    given, calls = regular(case, every_key=attend.every_key), calls or chain(case)
    history = given.bias.history

    def run(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        for index in range(calls):
            # Every layer has coefficients of its own: else one matrix would do for all.
            layer = bias._replace(history=history, coefficients=bias.coefficients * (1 + index / 16))
            q = attend(q, k, v, layer)
        return q

    return Program(run, given[:4], calls)


def bias_given(case: AttentionCase, kernel: Flash, calls: int = 0) -> Program:
    """A flash kernel and nothing else: its bias, ours with the mask, is an operand."""
    given, calls = regular(case, every_key=True), calls or chain(case)
    matrix = jax.jit(partial(_matrix, history=given.bias.history))(given.bias)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, matrix: jax.Array) -> jax.Array:
        for _ in range(calls):
            q, _ = kernel(q, k, v, matrix, total=False)
        return q

    # Keys, which do not change, are divided by the temperature instead of queries.
    scaled = (given.k * given.bias.inverse[:, :, None, :, None]).astype(given.k.dtype)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (given.q, scaled, given.v))
    return Program(run, (q, k, v, matrix), calls)


def _matrix(bias: Bias, history: int) -> jax.Array:
    """bfloat16[blocks * B, heads, rows, keys]."""
    made = masked_bias(bias._replace(history=history))
    return made.reshape(-1, *made.shape[2:]).astype(jnp.bfloat16)


def cudnn_programs(case: AttentionCase, kernel: Flash) -> dict[str, Maker]:
    """cuDNN with a mask bias: `given`, the bias is there already; `made`, it makes it, too."""
    return {"given": partial(bias_given, case, kernel), "made": partial(biased, case, FlashMasked(kernel))}
