"""The feature schema: what it refuses, its JSON form and its fingerprints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.schema import MAX_BITS, Block, Feature, FeatureSchema, record_dtype

Kind = Literal["categorical", "numeric", "bits", "id"]
Source = Literal["", "store", "request", "table"]

KINDS: tuple[Kind, ...] = ("categorical", "numeric", "bits", "id")
SOURCES: tuple[Source, ...] = ("", "store", "request", "table")
IDENTIFIERS = st.text("abxyz_", min_size=1, max_size=4)
NAMES = st.text(min_size=1, max_size=4)


@st.composite
def feature_groups(draw: st.DrawFn, sources: tuple[Source, ...] = ("",)) -> tuple[Feature, ...]:
    """Up to three features of any kind."""
    found = []
    for name in draw(st.lists(IDENTIFIERS, max_size=3, unique=True)):
        kind = draw(st.sampled_from(KINDS))
        sizes = {"categorical": st.integers(1, 2**31 - 1), "bits": st.integers(1, MAX_BITS), "numeric": st.just(0)}
        sizes["id"] = st.integers(4, 2**31 - 2)
        found.append(Feature(name, kind, draw(sizes[kind]), draw(st.sampled_from(sources))))
    return tuple(found)


@st.composite
def schemas(draw: st.DrawFn) -> FeatureSchema:
    """Any schema, small enough to work with."""
    actions = draw(st.integers(1, 5))
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    strategies = st.lists(st.integers(0, actions - 1), max_size=3).map(tuple)
    return FeatureSchema(
        tasks=tuple(draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))),
        scenarios=tuple(draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))),
        actions=actions,
        blocks=tuple(Block(name, draw(strategies)) for name in names),
        block_length=draw(st.integers(1, 12)),
        item_features=draw(feature_groups(SOURCES)),
        user_features=draw(feature_groups()),
        context_features=draw(feature_groups()),
    )


SCHEMA = FeatureSchema(
    tasks=("click", "like"),
    scenarios=("home", "search"),
    actions=3,
    blocks=(Block("all"), Block("liked", (1, 2))),
    block_length=16,
    item_features=(Feature("genres", "bits", 19), Feature("year", "numeric")),
    user_features=(Feature("age", "categorical", 7), Feature("sex", "categorical", 2)),
    context_features=(Feature("hour", "categorical", 24),),
)

STORE_CHANGES: list[dict[str, Any]] = [
    {"actions": 4},
    {"item_features": ()},
    {"item_features": SCHEMA.item_features[::-1]},
    {"item_features": (Feature("genres", "bits", 20), SCHEMA.item_features[1])},
    {"item_features": (Feature("genres", "categorical", 19), SCHEMA.item_features[1])},
    {"item_features": (Feature("genre", "bits", 19), SCHEMA.item_features[1])},
    {"user_features": SCHEMA.user_features[::-1]},
    {"item_features": (replace(SCHEMA.item_features[0], source="request"), SCHEMA.item_features[1])},
    {"user_features": (Feature("age", "id", 7), SCHEMA.user_features[1])},
]
MODEL_CHANGES: list[dict[str, Any]] = [
    {"tasks": ("like", "click")},
    {"scenarios": ("home",)},
    {"blocks": (Block("all"), Block("liked", (2, 1)))},
    {"blocks": (Block("every"), Block("liked", (1, 2)))},
    {"block_length": 17},
    {"context_features": ()},
    {"item_features": (replace(SCHEMA.item_features[0], source="table"), SCHEMA.item_features[1])},
    {"item_features": (*SCHEMA.item_features, Feature("price", "numeric", 0, "request"))},
]


@settings(max_examples=50)
@given(schemas())
def test_json_text_brings_back_the_same_schema(schema: FeatureSchema) -> None:
    again = FeatureSchema.from_json(json.loads(json.dumps(schema.to_json())))
    assert again == schema
    assert again.store_fingerprint() == schema.store_fingerprint()


@pytest.mark.parametrize("change", STORE_CHANGES, ids=str)
def test_what_the_store_holds_is_part_of_its_fingerprint(change: dict[str, Any]) -> None:
    changed = replace(SCHEMA, **change)
    assert changed.store_fingerprint() != SCHEMA.store_fingerprint()


@pytest.mark.parametrize("change", MODEL_CHANGES, ids=str)
def test_what_only_the_model_reads_leaves_the_stores_fingerprint(change: dict[str, Any]) -> None:
    changed = replace(SCHEMA, **change)
    assert changed.store_fingerprint() == SCHEMA.store_fingerprint()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Feature("", "numeric"), "identifier"),
        (lambda: Feature("two words", "numeric"), "identifier"),
        (lambda: Feature("a.b", "numeric"), "identifier"),
        (lambda: Feature("x\0", "numeric"), "identifier"),
        (lambda: Feature("x", "numeric", 1), "numeric"),
        (lambda: Feature("x", "categorical"), "categorical"),
        (lambda: Feature("x", "categorical", -1), "categorical"),
        (lambda: Feature("x", "categorical", 2**31), "categorical"),
        (lambda: Feature("x", "bits"), "bits"),
        (lambda: Feature("x", "bits", 32), "bits"),
        (lambda: Feature("x", "id"), "id"),
        (lambda: Feature("x", "id", 2**31 - 1), "id"),
        (lambda: Feature("x", "numeric", 0, "disk"), "disk"),  # type: ignore[arg-type]
        (lambda: FeatureSchema(user_features=(Feature("x", "numeric", 0, "request"),)), "user_features"),
        (lambda: FeatureSchema(user_features=(Feature("x", "numeric", 0, "table"),)), "user_features"),
        (lambda: FeatureSchema(context_features=(Feature("x", "numeric", 0, "store"),)), "context_features"),
        (lambda: FeatureSchema(tasks=()), "tasks"),
        (lambda: FeatureSchema(tasks=("a", "a")), "tasks"),
        (lambda: FeatureSchema(scenarios=("a", "")), "scenarios"),
        (lambda: FeatureSchema(blocks=()), "blocks"),
        (lambda: FeatureSchema(blocks=(Block("a"), Block("a", (0,)))), "blocks"),
        (lambda: FeatureSchema(actions=0), "actions"),
        (lambda: FeatureSchema(block_length=0), "block_length"),
        (lambda: FeatureSchema(actions=2, blocks=(Block("late", (2,)),)), "late"),
        (lambda: FeatureSchema(actions=2, blocks=(Block("early", (-1,)),)), "early"),
        (lambda: FeatureSchema(item_features=(Feature("x", "numeric"), Feature("x", "bits", 2))), "item_features"),
        (lambda: FeatureSchema(user_features=(Feature("x", "numeric"),) * 2), "user_features"),
        (lambda: FeatureSchema(context_features=(Feature("x", "numeric"),) * 2), "context_features"),
    ],
)
def test_a_schema_that_cannot_be_is_refused_with_its_reason(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_one_name_may_serve_in_several_groups() -> None:
    group = (Feature("x", "numeric"),)
    schema = FeatureSchema(item_features=group, user_features=group, context_features=group)
    assert [f"{group}.{f.name}" for group, f in schema.features] == ["item.x", "user.x", "context.x"]
    assert [f.source for _, f in schema.features] == ["store", "store", "request"]


def test_a_kind_that_does_not_exist_is_refused() -> None:
    kind: Any = "embedding"
    with pytest.raises(ValueError, match="embedding"):
        Feature("x", kind, 3)


def test_an_item_feature_may_not_take_the_name_of_the_stored_id() -> None:
    with pytest.raises(ValueError, match="id"):
        FeatureSchema(item_features=(Feature("id", "categorical", 5),))


@pytest.mark.parametrize(
    "change",
    [
        {"taks": ["a"]},
        {"actions": 0},
        {"actions": 2.5},
        {"tasks": "abc"},
        {"tasks": []},
        {"blocks": [{"name": "all", "actions": [7]}]},
        {"blocks": [{"name": "all", "actions": [], "length": 3}]},
        {"item_features": [{"name": "x", "kind": "bits", "size": 99}]},
        {"item_features": [{"name": "x", "kind": "embedding", "size": 3}]},
        {"item_features": [{"name": "x", "kind": "numeric", "width": 3}]},
    ],
    ids=str,
)
def test_json_with_an_unknown_field_or_a_bad_value_is_a_value_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FeatureSchema.from_json(SCHEMA.to_json() | change)


@settings(max_examples=50)
@given(feature_groups())
def test_a_packed_row_has_one_value_a_feature_in_the_schemas_order(features: tuple[Feature, ...]) -> None:
    dtype = record_dtype(features)
    assert dtype.itemsize == sum(8 if f.kind == "id" else 4 for f in features)
    assert list(dtype.names or ()) == [f.name for f in features]
    for feature in features:
        assert dtype[feature.name] == {"numeric": np.float32, "id": np.int64}.get(feature.kind, np.int32)


@pytest.mark.parametrize(
    ("feature", "limit"),
    [
        (Feature("x", "categorical", 7), 7),
        (Feature("x", "categorical", 2**31 - 1), 2**31 - 1),
        (Feature("x", "id", 7), 8),
        (Feature("x", "id", 2**31 - 2), 2**31 - 1),
        (Feature("x", "bits", 1), 2),
        (Feature("x", "bits", MAX_BITS), 2**31),
    ],
)
def test_values_of_a_feature_end_before_its_limit_and_fit_a_word(feature: Feature, limit: int) -> None:
    assert feature.limit == limit
    assert limit - 1 <= np.iinfo(feature.dtype).max


def test_how_many_keys_the_model_knows_is_no_matter_of_the_stores() -> None:
    few, many = (FeatureSchema(item_features=(Feature("maker", "id", size),)) for size in (5, 500))
    assert few.store_fingerprint() == many.store_fingerprint()


def test_each_feature_is_where_its_source_says() -> None:
    features = tuple(Feature(source or "own", "numeric", 0, source) for source in SOURCES)
    schema = FeatureSchema(item_features=features, user_features=(Feature("age", "numeric"),))
    assert [f.name for f in schema.stored_item_features] == ["own", "store", "table"]
    assert [(group, f.name) for group, f in schema.slot_features] == [
        ("item", "own"),
        ("item", "store"),
        ("item", "request"),
        ("user", "age"),
    ]
    assert schema.fetches_items
    assert not FeatureSchema(item_features=features[2:]).fetches_items
