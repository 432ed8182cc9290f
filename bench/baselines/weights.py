"""The model's weights as a plain program wants them: cast beforehand, a dictionary per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flame_jax.config import ModelConfig
from flame_jax.models.serving import served_weights

Layer = dict[str, Any]


class Climber(NamedTuple):
    """Weights of Climber's blocks, as NumPy or JAX arrays.

    Attributes:
        layers: `qkv_w` [blocks, d, 3 * inner] and so on; matrices and their biases in the model's dtype.
        inverse: float32[layers, blocks, scenarios, heads], 1 / temperature.
        bias: float32[layers, blocks, scenarios, heads, 3], (alpha, beta, gamma).
    """

    layers: list[Layer]
    inverse: Any
    bias: Any


def climber_weights(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Climber:
    """The stack's, of trained weights by name."""
    stack = _part(config, weights, "layers/")
    temperature, bias = stack.pop("temperature"), stack.pop("bias")
    return Climber(_unstacked(stack, config.layers), _inverse(temperature), bias)


def hstu_weights(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> list[Layer]:
    """Per layer `uvqk_w` [D, 2 * (values + keys)], `out_w` [3 * values, D] and so on."""
    return _unstacked(_part(config, weights, "layers/"), config.layers)


def outer_weights(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What lies around the stack: tables by name, and the dictionaries `fusion`, `gate` and `head`."""
    served = served_weights(config, weights)
    outer: dict[str, Any] = {name: weight for name, weight in served.items() if "/" not in name}
    outer["head"] = _part(config, weights, "head/") | {"logit_w": weights["head/logit_w"]}
    if config.architecture == "climber":
        outer["gate"], outer["fusion"] = _part(config, weights, "gate/"), _part(config, weights, "fusion/")
        outer["fusion"]["inverse"] = _inverse(outer["fusion"].pop("temperature"))
    return outer


def _part(config: ModelConfig, weights: Mapping[str, np.ndarray], prefix: str) -> Layer:
    """Weights of a prefix without it; matrices and their biases in the model's dtype, the rest float32."""
    dtype = jnp.dtype(config.dtype)
    part = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return {name: w.astype(dtype) if name.endswith(("_w", "_b")) else w for name, w in part.items()}


def _unstacked(stack: Layer, layers: int) -> list[Layer]:
    # A slice of a stacked weight inside the program may cost a copy in front of every product.
    return [{name: np.ascontiguousarray(w[index]) for name, w in stack.items()} for index in range(layers)]


def _inverse(temperature: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = (1.0 / np.logaddexp(0.0, temperature.astype(np.float64))).astype(np.float32)
    return inverse
