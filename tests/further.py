"""Further CPU clients, which serving does without: what a GPU's lanes do can be run here with them."""

from __future__ import annotations

from typing import Any

import jax
from jaxlib import xla_client

from flame_jax.pjrt import Clients


def make_cpu_client(device: jax.Device, memory: float, number: int) -> Any:
    """A client with the same devices as JAX's own."""
    return xla_client.make_cpu_client()


def cpu_clients() -> Clients:
    """None made yet."""
    return Clients({"cpu": make_cpu_client})
