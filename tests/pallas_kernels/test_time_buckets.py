"""Time buckets against exact integer arithmetic, at every boundary an int32 has."""

from __future__ import annotations

from decimal import Decimal, getcontext
from math import isqrt

import jax.numpy as jnp
import numpy as np

from flame_jax.pallas_kernels.time_buckets import log_bucket, sqrt_bucket

MOST = 2**31 - 1


def test_log_buckets_are_exact_around_every_boundary() -> None:
    getcontext().prec = 40
    edges = [int((Decimal("0.301") * k).exp()) for k in range(1, 72)]
    seconds = sorted({min(MOST, max(0, edge + off)) for edge in edges for off in (-1, 0, 1, 2)} | {MOST})
    expected = [int(Decimal(max(s, 1)).ln() / Decimal("0.301")) for s in seconds]
    assert np.asarray(log_bucket(jnp.array(seconds, jnp.int32), 1000)).tolist() == expected
    assert np.asarray(log_bucket(-jnp.array(seconds, jnp.int32), 1000)).tolist() == expected
    assert np.asarray(log_bucket(jnp.array([MOST], jnp.int32), 9)).tolist() == [8]


def test_square_root_buckets_are_exact_around_every_boundary() -> None:
    edges = 60 * np.arange(0, 5983, dtype=np.int64) ** 2
    seconds = np.clip((edges[:, None] + np.array([-1, 0, 1, 59])).ravel(), 0, MOST)
    expected = [isqrt(int(s) // 60) for s in seconds]
    assert np.asarray(sqrt_bucket(jnp.asarray(seconds, jnp.int32), 60, 10_000)).tolist() == expected
    assert np.asarray(sqrt_bucket(jnp.array([MOST], jnp.int32), 60, 16)).tolist() == [15]
