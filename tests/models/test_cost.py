"""The cost of a request, against counts by hand and by loops, and against the figures that papers are compared at; the
cost of a bucket, against the matrix products of the program that is compiled for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from flame_jax.commandline import load
from flame_jax.config import ClimberConfig, Config, HeadConfig, HstuConfig, ModelConfig
from flame_jax.models.cost import bucket_cost, filled_cost, request_cost
from flame_jax.models.serving import rank_function, served_slot, served_specs
from flame_jax.packing import Bucket, Extent, Layout, fits, slot_layout
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
    assert request_cost(config, schema, history, candidates).slot_bytes == 4 * sum(f.words for f in slot.fields)


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


ONE_BLOCK = FeatureSchema(
    tasks=("s", "t"),
    block_length=20,
    item_features=(Feature("x", "numeric"), Feature("y", "bits", 7)),
    user_features=(Feature("u", "bits", 3), Feature("v", "categorical", 4)),
    context_features=(Feature("c", "bits", 5),),
)
TWO_BLOCKS = replace(ONE_BLOCK, blocks=(Block("a"), Block("b")))
SIZES = ModelConfig(width=6, layers=3, heads=2, head_dim=4, ffn=10, position_rows=9, head=HeadConfig(2, 5, 3))
HSTU = HstuConfig(value_dim=7, time_rows=8)
LAYOUT = Layout(align=8, max_requests=3)

MODELS = {
    "climber": (replace(SIZES, architecture="climber"), TWO_BLOCKS),
    "climber_plain": (
        replace(SIZES, architecture="climber", climber=ClimberConfig(fusion=False, adaptive=False)),
        TWO_BLOCKS,
    ),
    "transformer": (replace(SIZES, architecture="transformer"), ONE_BLOCK),
    "one_expert": (replace(SIZES, architecture="transformer", head=HeadConfig(1, 5, 3)), ONE_BLOCK),
    "one_layer": (replace(SIZES, architecture="transformer", layers=1), ONE_BLOCK),
    "dlrm_v3": (replace(SIZES, architecture="hstu", hstu=HSTU), ONE_BLOCK),
    "recsys_examples": (
        replace(SIZES, architecture="hstu", hstu=replace(HSTU, variant="recsys_examples")),
        replace(ONE_BLOCK, interleave=True),
    ),
    "research": (replace(SIZES, architecture="hstu", hstu=replace(HSTU, variant="research")), ONE_BLOCK),
}


def matrix_products(jaxpr: Any) -> int:
    """FLOPs of every dot_general of a program, those in a loop counted as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
        inner = sum(matrix_products(sub) for sub in jaxprs_in_params(equation.params))
        assert not inner or equation.primitive.name not in ("while", "cond"), "runs nobody knows how often"
        total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


@pytest.mark.parametrize("bucket", [Bucket(64, 24), Bucket(16, 16), Bucket(48, 8)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_buckets_cost_is_the_matrix_products_of_its_program(name: str, bucket: Bucket) -> None:
    config, schema = MODELS[name]
    slot = served_slot(config, schema, LAYOUT, bucket)
    weights = list(served_specs(config, schema, 30).values())
    words = np.zeros(slot.words, np.int32)
    program = jax.make_jaxpr(rank_function(config, schema, LAYOUT, slot, 30))(weights, words)
    # A row's own key has one value, whose weighting is a product number by number; so is the fusion's attention, for
    # which the two blocks of a candidate are the keys.
    value = 7 if config.architecture == "hstu" else 4
    rows = (config.layers - 1) * bucket.tokens + bucket.candidates
    own_values = len(schema.blocks) * rows * 2 * 2 * value
    fused = config.architecture == "climber" and config.climber.fusion
    between_blocks = bucket.candidates * 2 * 2 * 2 * 2 * (4 + 4) if fused else 0
    # And so are, for each of 2 tasks, the head's mixing of experts of 5 numbers and the last step of towers of 3.
    mixed = config.head.experts * 5 if config.head.experts > 1 else 0
    head = bucket.candidates * 2 * 2 * (mixed + 3)
    expected = matrix_products(program.jaxpr) + own_values + between_blocks + head
    assert bucket_cost(config, schema, LAYOUT, bucket) == expected


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 24)), min_size=1, max_size=3),
)
def test_a_batch_makes_use_of_no_more_than_its_bucket_costs(name: str, requests: list[tuple[int, int]]) -> None:
    config, schema = MODELS[name]
    bucket = Bucket(160, 96)
    extents = [Extent(min(history, schema.history_rows), candidates) for history, candidates in requests]
    assert fits(extents, bucket, LAYOUT)
    useful = filled_cost(config, schema, *np.array(extents, np.int64).T).sum()
    assert 0 < useful < bucket_cost(config, schema, LAYOUT, bucket)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_request_makes_use_of_is_its_cost_less_the_last_layers_work_on_history_rows(name: str) -> None:
    config, schema = MODELS[name]
    history, candidates, blocks = 13, 5, len(schema.blocks)
    hstu = config.architecture == "hstu"
    value = 7 if hstu else 4
    outputs = {"dlrm_v3": 3}.get(config.hstu.variant, 1) * 2 * 7
    after = outputs * 6 if hstu else 2 * 4 * 6 + 2 * 6 * 10
    pairs = sum(row + 1 for row in range(history)) if hstu else history * history
    unused = blocks * (history * 2 * after + pairs * 2 * 2 * (4 + value))
    bits = 2 * 6 * (candidates * 7 + 3 + 5)
    cost = request_cost(config, schema, history, candidates)
    (useful,) = filled_cost(config, schema, np.array([history]), np.array([candidates]))
    assert useful == cost.layers + cost.rest - unused + bits
