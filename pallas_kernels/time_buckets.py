"""Time differences to table rows, exactly: float32 logarithms and roots miss bucket boundaries after some days."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LOG_WIDTH = 0.301
"""Width of a logarithmic bucket in natural logarithms of seconds (the first HSTU paper's code)."""

_LIMIT = 2**31 - 1
# No threshold e^(0.301 k) is an integer, so there are no ties.
LOG_THRESHOLDS = np.array([t for k in range(1, 72) if (t := int(np.ceil(np.exp(LOG_WIDTH * k)))) <= _LIMIT], np.int32)
"""Smallest |difference| of bucket 1, 2, ..."""


def log_bucket(difference: jax.Array, rows: int) -> jax.Array:
    """min(floor(ln(max(|d|, 1)) / 0.301), rows - 1) of int32 d in (-2^31, 2^31)."""
    bucket = jnp.searchsorted(jnp.asarray(LOG_THRESHOLDS), jnp.abs(difference), side="right")
    return jnp.minimum(bucket.astype(jnp.int32), rows - 1)


def sqrt_bucket(seconds: jax.Array, step: int, rows: int) -> jax.Array:
    """min(floor(sqrt(seconds / step)), rows - 1) of int32 seconds >= 0 and a whole step >= 60."""
    whole = seconds // step  # floor(sqrt(x)) depends on floor(x) only
    root = jnp.sqrt(whole.astype(jnp.float32)).astype(jnp.int32)
    root -= (root * root > whole).astype(jnp.int32)
    root += ((root + 1) * (root + 1) <= whole).astype(jnp.int32)
    return jnp.minimum(root, rows - 1)
