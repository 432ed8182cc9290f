"""The cost of a request, against counts by hand and by loops, and against the figures that papers are compared at."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_jax.config import Config, HeadConfig, HstuConfig, ModelConfig, load
from flame_jax.models.cost import request_cost
from flame_jax.schema import FeatureSchema

CONFIGS = Path(__file__).parents[2] / "configs"


def configuration(name: str) -> Config:
    return load(["--config", str(CONFIGS / f"{name}.yaml")], prog="test")


@pytest.mark.parametrize(
    ("name", "candidates", "useful", "with_masked"),
    [("climber_base", 128, 4.83e9, 5.43e9), ("climber_long", 512, 1.61e10, 2.25e10)],
)
def test_the_papers_configurations(name: str, candidates: int, useful: float, with_masked: float) -> None:
    config = configuration(name)
    cost = request_cost(config.model, config.schema, config.schema.block_length, candidates)
    assert cost.layers == pytest.approx(useful, rel=3e-3)
    assert cost.layers_with_masked == pytest.approx(with_masked, rel=3e-3)


def test_hstu_by_a_loop_over_what_each_row_sees() -> None:
    config = ModelConfig(
        architecture="hstu",
        width=6,
        layers=3,
        heads=2,
        head_dim=4,
        head=HeadConfig(2, 5, 3),
        hstu=HstuConfig(value_dim=7),
    )
    history, candidates = 5, 4
    seen = [row + 1 for row in range(history)] + [history + 1] * candidates
    attention = sum(2 * keys * 2 * (4 + 7) for keys in seen)
    linear = 9 * (2 * 6 * (2 * 2 * (4 + 7)) + 2 * (3 * 2 * 7) * 6)
    cost = request_cost(config, FeatureSchema(), history, candidates)
    assert cost.attention == 3 * attention
    assert cost.linear == 3 * linear
    dense = 9 * 9 * 2 * 2 * (4 + 7)
    assert cost.attention + cost.masked == 3 * dense
    experts, mix, tower = 2 * 2 * 6 * 5, 2 * (6 * 2 + 2 * 5), 2 * (5 * 3 + 3)
    assert cost.rest == candidates * (experts + mix + tower)


@pytest.mark.parametrize("name", ["climber_base", "climber_long", "hstu_dlrmv3", "hstu_8l", "hstu_ml100k", "demo"])
def test_every_configuration_makes_a_ladder_and_a_model(name: str) -> None:
    from flame_jax.fke.buckets import make_ladder
    from flame_jax.models.serving import abstract_model, weight_specs

    config = configuration(name)
    assert make_ladder(config.export.buckets, config.schema, config.layout)
    assert weight_specs(abstract_model(config.model, config.schema, 100))
