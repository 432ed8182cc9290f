"""The head against its float64 oracle, one expert alone included."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flame_jax.models.heads import expert_head
from tests.oracles import head
from tests.oracles.small import head_shapes


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_it_is_the_oracles(experts: int) -> None:
    random = np.random.default_rng(experts)
    params = {name: random.normal(size=shape).astype(np.float32) for name, shape in head_shapes(experts, 5).items()}
    params["item_bias"] = np.zeros((1, 2), np.float32)
    y = random.normal(size=(7, 5)).astype(np.float32)
    weights = {n.removeprefix("head/"): jnp.asarray(w) for n, w in params.items() if n.startswith("head/")}
    expected = [head.logits(params, row, 0) for row in y]
    np.testing.assert_allclose(expert_head(weights, jnp.asarray(y)), expected, rtol=0, atol=1e-5)
