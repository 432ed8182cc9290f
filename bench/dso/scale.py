"""How large the bench is: climber_long on a GPU, a small model with the same code on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from bench.dso.simulate import HEAVY, PAPER
from bench.dso.traffic import Mix, heavy, paper
from flame_jax.commandline import load
from flame_jax.config import Config, ModelConfig
from flame_jax.packing import Layout

_SMALL = ModelConfig(width=32, layers=1, heads=2, head_dim=16, ffn=64)
_SCALE = 8
"""How many times as short requests are on a CPU."""


@dataclass(frozen=True)
class Scale:
    """A mix and what serves it.

    Attributes:
        lanes: numbers of lanes that are compared.
        implicit: every shape of the mix is compiled for itself, too.
        inside: requests inside when a system is saturated.
    """

    config: Config
    mix: Mix
    buckets: Sequence[tuple[int, int]]
    lanes: Sequence[int]
    implicit: bool
    inside: int


def scale_of(name: str, device: jax.Device) -> Scale:
    """Of a mix on a device."""
    config = load(["--config", "configs/climber_long.yaml"], prog="bench.dso")
    small = device.platform == "cpu"
    make = paper if name == "paper" else heavy
    buckets: Sequence[tuple[int, int]] = PAPER if name == "paper" else HEAVY
    mix = make(len(config.schema.blocks), _SCALE if small else 1)
    schema = replace(config.schema, block_length=max(shape.history for shape in mix.shapes))
    if small:
        config = replace(config, model=_SMALL, layout=Layout(align=8, max_requests=32))
        buckets = tuple((tokens // _SCALE, candidates // _SCALE) for tokens, candidates in buckets[:-1])
    return Scale(
        replace(config, schema=schema), mix, buckets, (1, 2) if small else (1, 2, 4), not small, 256 if small else 2048
    )
