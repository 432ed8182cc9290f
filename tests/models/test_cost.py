"""The cost of a request, against counts by hand and by loops, and against the figures that papers are compared at."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from flame_jax.commandline import load
from flame_jax.config import Config, HeadConfig, HstuConfig, ModelConfig
from flame_jax.models.cost import request_cost
from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.schema import Block, Feature, FeatureSchema

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


@pytest.mark.parametrize("place", ["device", "host"])
def test_slot_bytes_are_those_of_a_slot_that_one_request_fills(place: Literal["device", "host"]) -> None:
    config = ModelConfig(width=6, item_table=place)
    schema = FeatureSchema(
        blocks=(Block("a"), Block("b")),
        item_features=(Feature("x", "numeric"), Feature("y", "id", 5), Feature("z", "id", 5, "table")),
        user_features=(Feature("u", "id", 5),),
        context_features=(Feature("c", "bits", 3),),
    )
    history, candidates = 7, 5
    bucket = Bucket(history + candidates, candidates)
    slot = slot_layout(schema, Layout(align=1, max_requests=1), bucket, host_words=config.host_words)
    assert request_cost(config, schema, history, candidates).slot_bytes == 4 * slot.words


def test_history_bytes_by_hand() -> None:
    """Two blocks of three layers, 7 rows of 2 heads with a key of 4 and a value of 4 numbers, 2 bytes each."""
    config = ModelConfig(width=6, layers=3, heads=2, head_dim=4, dtype="bfloat16")
    cost = request_cost(config, FeatureSchema(blocks=(Block("a"), Block("b")), tasks=("s", "t")), 7, 5)
    assert cost.history_bytes == 2 * 3 * 7 * 2 * (4 + 4) * 2
    assert cost.score_bytes == 4 * 5 * 2


@pytest.mark.parametrize(
    "name", ["climber_base", "climber_long", "hstu_dlrmv3", "hstu_8l", "hstu_ml100k", "demo", "completejourney"]
)
def test_every_configuration_makes_a_ladder_and_a_model(name: str) -> None:
    from flame_jax.fke.buckets import make_ladder
    from flame_jax.models.serving import abstract_model, weight_specs

    config = configuration(name)
    assert make_ladder(config.export.buckets, config.schema, config.layout)
    assert weight_specs(abstract_model(config.model, config.schema, 100))
