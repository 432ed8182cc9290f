"""From a candidate's representation to one logit per task: experts, mixed per task, and a tower each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import HeadConfig
from flame_jax.models.params import Param, constant, normal
from flame_jax.pallas_kernels.rows import linear, wide_linear


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
    count, tasks = len(weights["expert_w"]), len(weights["mix_w"])
    # A product per expert and task, over copies that are never made, takes the weights as they are stored; of one
    # product over them all, XLA would transpose the weights for every batch.
    own = jnp.broadcast_to(y, (count, *y.shape))
    experts = jax.nn.relu(wide_linear(own, weights["expert_w"], weights["expert_b"])).astype(y.dtype)
    mixed = jnp.broadcast_to(experts, (tasks, *experts.shape[1:])) if count == 1 else _mixed(weights, y, experts)
    tower = jax.nn.relu(linear(mixed, weights["tower_w"], weights["tower_b"])).astype(jnp.float32)
    logits = (tower * weights["logit_w"][:, None]).sum(axis=-1) + weights["logit_b"][:, None]
    return logits.T


def _mixed(weights: dict[str, jax.Array], y: jax.Array, experts: jax.Array) -> jax.Array:
    """Each task's mixture of the experts [experts, C, h]: [tasks, C, h]."""
    own = jnp.broadcast_to(y, (len(weights["mix_w"]), *y.shape))
    # Rounded, unlike the experts: XLA would merge products of one kind, and put their weights together for every batch.
    shares = jax.nn.softmax(linear(own, weights["mix_w"], weights["mix_b"]).astype(jnp.float32), axis=-1)
    # Experts are few: a sum of products is one kernel with the softmax.
    return (shares[..., None] * jnp.moveaxis(experts, 0, 1)).sum(axis=-2).astype(y.dtype)
