"""From a candidate's representation to one logit per task: experts, mixed per task, and a tower each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import HeadConfig
from flame_jax.models.params import Param, constant, normal


def head_weights(rngs: nnx.Rngs, config: HeadConfig, width: int, tasks: int) -> nnx.Dict[Param]:
    """Weights of `expert_head` over `width` inputs. Logits start at 0."""
    experts, hidden, tower = config.experts, config.expert_hidden, config.tower_hidden
    return nnx.Dict(
        expert_w=normal(rngs, (experts, width, hidden), width**-0.5),
        expert_b=constant((experts, hidden), 0.0),
        mix_w=normal(rngs, (tasks, width, experts), width**-0.5),
        mix_b=constant((tasks, experts), 0.0),
        tower_w=normal(rngs, (tasks, hidden, tower), hidden**-0.5),
        tower_b=constant((tasks, tower), 0.0),
        logit_w=constant((tasks, tower), 0.0),
        logit_b=constant((tasks,), 0.0),
    )


def expert_head(weights: dict[str, jax.Array], y: jax.Array) -> jax.Array:
    """Multi-task experts and towers (docs/models.md, "Head").

    Args:
        y: [C, m].

    Returns:
        float32[C, tasks].
    """
    w = {name: leaf.astype(y.dtype) for name, leaf in weights.items()}
    experts = jax.nn.relu(jnp.einsum("cm,emh->ech", y, w["expert_w"]) + w["expert_b"][:, None])
    mix = jnp.einsum("cm,tme->tce", y, w["mix_w"]) + w["mix_b"][:, None]
    shares = jax.nn.softmax(mix.astype(jnp.float32), axis=-1).astype(y.dtype)
    mixed = jnp.einsum("tce,ech->tch", shares, experts)
    tower = jax.nn.relu(jnp.einsum("tch,thk->tck", mixed, w["tower_w"]) + w["tower_b"][:, None])
    logits = jnp.einsum("tck,tk->ct", tower.astype(jnp.float32), weights["logit_w"])
    return logits + weights["logit_b"]
