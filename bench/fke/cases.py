"""The shapes that are tuned and timed: the configurations' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flame_jax.packing import REQUEST_TIME, Bucket, Extent, Layout, place
from flame_jax.pallas_kernels.post_attention.types import Projection
from flame_jax.pallas_kernels.sumi_attention.types import Activation, Bias, LogBias, Silu, Softmax

NOW = 1_700_000_000


class AttentionCase(NamedTuple):
    """A batch of requests for one attention.

    Attributes:
        softmax: with a log bias and temperatures; else SiLU, causal, without a bias.
        extents: requests.
        align: the layout's alignment.
    """

    name: str
    blocks: int
    heads: int
    dim: int
    softmax: bool
    extents: tuple[Extent, ...]
    align: int = 64

    @property
    def layout(self) -> Layout:
        """With room for these requests."""
        return Layout(align=self.align, max_requests=max(32, len(self.extents)))

    @property
    def bucket(self) -> Bucket:
        """The smallest one that holds them."""
        aligned = [self.layout.aligned_extent(e) for e in self.extents]
        candidates = sum(a.candidates for a in aligned)
        return Bucket(sum(a.history for a in aligned) + candidates, candidates)

    @property
    def flops(self) -> int:
        """Useful ones: of pairs that are seen."""
        pairs = 0
        for n, c in self.extents:
            pairs += (n * n if self.softmax else n * (n + 1) // 2) + c * (n + 1)
        return 4 * self.blocks * self.heads * self.dim * pairs

    @property
    def bytes(self) -> int:
        """What has to move at least: q, k, v and the result of the requests' rows, and with a bias their times."""
        rows = sum(n + c for n, c in self.extents)
        return self.blocks * rows * (4 * self.heads * self.dim * 2 + 4 * self.softmax)


def _alike(name: str, count: int, extent: tuple[int, int]) -> AttentionCase:
    return AttentionCase(name, 2, 2, 64, softmax=True, extents=(Extent(*extent),) * count)


CLIMBER = [
    _alike("climber_base B=1", 1, (256, 128)),
    _alike("climber_base B=8", 8, (256, 128)),
    _alike("climber_base B=32", 32, (256, 128)),
    _alike("climber_long B=1", 1, (512, 512)),
    _alike("climber_long B=8", 8, (512, 512)),
    _alike("climber_long B=32", 32, (512, 512)),
]
HSTU = [
    AttentionCase("hstu_dlrmv3 B=1", 1, 4, 128, softmax=False, extents=(Extent(1024, 2048),)),
    AttentionCase("hstu_dlrmv3 B=32", 1, 4, 128, softmax=False, extents=(Extent(1024, 2048),) * 32),
]
CAUSAL = [
    # The last rows are candidates, which take a tile of their own; the published figures are of a history alone.
    AttentionCase(f"causal SiLU 16 x {n}", 1, 4, 128, softmax=False, extents=(Extent(n - 64, 64),) * 16)
    for n in (1024, 2048, 4096, 8192)
]


def inputs(
    case: AttentionCase, seed: int = 0, *, held: Sequence[Extent] | None = None, bucket: Bucket | None = None
) -> tuple[tuple[jax.Array, ...], Activation, Bias | None]:
    """q, k, v, rows, time on the device; the activation and the bias.

    Args:
        held: what the requests hold, where the case's extents are padded.
        bucket: in place of the smallest one.
    """
    random, bucket = np.random.default_rng(seed), bucket or case.bucket
    shape = (case.blocks, bucket.tokens, case.heads, case.dim)
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    rows = np.zeros((case.layout.max_requests, 5 + case.blocks), np.int32)
    time = np.sort(NOW - np.exp(random.uniform(0, 17, (case.blocks, bucket.tokens)))).astype(np.int32)
    places = place(case.extents, bucket, case.layout)
    for number, (extent, where) in enumerate(zip(held or case.extents, places, strict=True)):
        start, lengths = where.candidate_start, [extent.history] * case.blocks
        rows[number] = (where.history_start, start, extent.candidates, 0, NOW, *lengths)
        time[:, start : start + case.layout.aligned(extent.candidates)] = rows[number, REQUEST_TIME]
    arrays = (q, k, v, jnp.asarray(rows), jnp.asarray(time))
    if not case.softmax:
        # Results of size 1, or else a chain of calls would tend to 0, where every kernel is right.
        return arrays, Silu(case.dim**-0.5, 32.0), None
    per_head = (case.blocks, 1, case.heads)
    return (
        arrays,
        Softmax(jnp.full(per_head, case.dim**0.5, jnp.float32)),
        LogBias(jnp.asarray(0.1 * random.normal(size=(*per_head, 3)), jnp.float32)),
    )


def hstu_weights(random: np.random.Generator, width: int = 512) -> dict[str, jax.Array]:
    """Two of HSTU's layers (`dlrm_v3`, heads as wide as the model together), by name, as `layer_weights`."""
    weights = {}
    for name, rows, columns in (("uvqk", width, 4 * width), ("out", 3 * width, width)):
        weights[f"{name}_w"] = jnp.asarray(random.normal(size=(2, rows, columns)) * rows**-0.5, jnp.bfloat16)
    for name, size, mean in (
        ("uvqk_b", 4 * width, 0),
        ("input_scale", width, 1),
        ("input_shift", width, 0),
        ("output_scale", width, 1),
        ("output_shift", width, 0),
    ):
        weights[name] = jnp.asarray(mean + 0.1 * random.normal(size=(2, size)), jnp.float32)
    return weights


def layer_weights(random: np.random.Generator, width: int = 128, hidden: int = 512) -> dict[str, jax.Array]:
    """Two post-norm layers of two blocks, by name: bfloat16 matrices, float32 vectors."""
    sizes = {"qkv": (width, 3 * width), "out": (width, width), "ffn1": (width, hidden), "ffn2": (hidden, width)}
    weights = {}
    for name, (rows, columns) in sizes.items():
        weights[f"{name}_w"] = jnp.asarray(random.normal(size=(2, 2, rows, columns)) * rows**-0.5, jnp.bfloat16)
        weights[f"{name}_b"] = jnp.asarray(0.1 * random.normal(size=(2, 2, columns)), jnp.float32)
    for name in ("norm1", "norm2"):
        weights[f"{name}_scale"] = jnp.asarray(1 + 0.1 * random.normal(size=(2, 2, width)), jnp.float32)
        weights[f"{name}_shift"] = jnp.asarray(0.1 * random.normal(size=(2, 2, width)), jnp.float32)
    return weights


def following(weights: dict[str, jax.Array]) -> Projection:
    """Of the first of those layers: the second's q, k and v."""
    return Projection(weights["qkv_w"], weights["qkv_b"], 1)
