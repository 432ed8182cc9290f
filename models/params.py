"""Making weights: every model is a tree of float32 `nnx.Param`s."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

Param = nnx.Param[jax.Array]


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> Param:
    """Normal numbers of standard deviation `scale`."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * scale)


def constant(shape: tuple[int, ...], value: float) -> Param:
    """All `value`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32))
