"""A dispatcher by its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flame_jax.config import DispatchConfig
from flame_jax.dso.costs import CostModel
from flame_jax.dso.deadline_cost import DeadlineCost
from flame_jax.dso.descending import Descending
from flame_jax.dso.policy import Costs, Policy
from flame_jax.dso.scheduler import Limits, Scheduler
from flame_jax.fke.buckets import Ladder
from flame_jax.packing import Bucket, Layout

LEAD = 3e-4
"""Seconds from a decision until its batch can run, before any has: filling its slot and the copy to the device."""


def make_policy(config: DispatchConfig, ladder: Ladder, layout: Layout, costs: Costs) -> Policy:
    """The policy of that name."""
    if config.policy == "descending":
        return Descending(ladder, layout)
    return DeadlineCost(ladder, layout, costs, max_wait=config.max_wait_us / 1e6)


def make_scheduler(
    config: DispatchConfig,
    layout: Layout,
    measured: Mapping[Bucket, Sequence[float]],
    *,
    shares: Sequence[float],
    lanes: int,
    on_left: Callable[[np.ndarray], None] = lambda record: None,
) -> Scheduler:
    """The books of a dispatcher.

    Args:
        measured: of every bucket of the ladder; see `CostModel`.
        shares: of the traffic classes.
        on_left: see `Scheduler`.
    """
    ladder, costs = tuple(sorted(measured)), CostModel(measured)
    limits = Limits(config.max_queue, config.target_wait_ms / 1e3, tuple(shares))
    policy = make_policy(config, ladder, layout, costs)
    return Scheduler(
        ladder, layout, costs, policy, limits, lanes=lanes, depth=config.executors, lead=LEAD, on_left=on_left
    )
