"""Making and checking weights: a model is a tree of float32 `nnx.Param`s, and of `Column`s that are not trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Param = nnx.Param[jax.Array]


class Column(nnx.Variable[jax.Array]):
    """Values of an item feature by item row: they belong to the model, and training leaves them alone."""


WEIGHTS = (nnx.Param, Column)
"""What a model's flat list of weights is made of (an `nnx` filter)."""


def misfits(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> list[str]:
    """Every name that is missing, extra or of another shape, in words."""
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"extra {name}" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    return problems


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> Param:
    """Normal numbers of standard deviation `scale`."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * scale)


def constant(shape: tuple[int, ...], value: float) -> Param:
    """All `value`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32))
