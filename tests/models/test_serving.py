"""The flat list of weights, and slots taken apart inside the program."""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.models.serving import (
    abstract_model,
    check_weights,
    flat_weights,
    load_weights,
    rank_function,
    unpack,
    weight_specs,
)
from flame_jax.packing import Bucket, Extent, Layout, slot_layout
from flame_jax.schema import Block, Feature, FeatureSchema
from tests import tiny


def test_names_and_order_do_not_depend_on_how_the_model_was_made() -> None:
    real, other = tiny.model(0), tiny.model(1)
    abstract = abstract_model(tiny.MODEL, tiny.SCHEMA, tiny.ITEMS + 1)
    names = list(flat_weights(real))
    assert names == list(flat_weights(other)) == list(weight_specs(abstract)) == list(weight_specs(real))
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert len(set(names)) == len(names)


def test_shapes_are_those_of_the_weights() -> None:
    weights = flat_weights(tiny.model())
    specs = weight_specs(abstract_model(tiny.MODEL, tiny.SCHEMA, tiny.ITEMS + 1))
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        name: (value.shape, value.dtype) for name, value in weights.items()
    }
    assert weights["item"].shape == (tiny.ITEMS + 1, tiny.MODEL.width)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}


def test_the_scores_depend_on_every_weight() -> None:
    """A leaf that is dropped or swapped on the way into the program would go unnoticed otherwise."""
    bucket = tiny.BUCKETS[1]
    words, slot = tiny.packed_slot(bucket, [Extent(15, 7), Extent(9, 8), Extent(0, 8)], seed=2)
    rank = jax.jit(rank_function(tiny.MODEL, tiny.SCHEMA, tiny.LAYOUT, slot, tiny.ITEMS + 1))
    weights = tiny.random_weights(3)
    right = np.asarray(rank(list(weights.values()), words))
    idle = []
    for name, value in weights.items():
        random = np.random.default_rng(1)
        changed = weights | {name: value + random.normal(size=value.shape).astype(np.float32)}
        if np.array_equal(np.asarray(rank(list(changed.values()), words)), right):
            idle.append(name)
    assert idle == []


def test_weights_that_were_read_can_be_loaded() -> None:
    model, weights = tiny.model(0), tiny.random_weights(4)
    load_weights(model, weights)
    found = flat_weights(model)
    assert list(found) == list(weights)
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


def test_the_order_of_the_mapping_does_not_matter() -> None:
    model, weights = tiny.model(0), tiny.random_weights(4)
    load_weights(model, dict(reversed(weights.items())))
    assert all(np.array_equal(value, weights[name]) for name, value in flat_weights(model).items())


def test_every_weight_that_does_not_fit_is_named_and_nothing_changes() -> None:
    model = tiny.model(0)
    before = flat_weights(model)
    weights = dict(tiny.random_weights(4))
    missing, odd = ["head/tower_w", "item"], ["action", "gate/squeeze_b"]
    for name in missing:
        del weights[name]
    for name in odd:
        weights[name] = weights[name][1:]
    extra = ["other", "item/more"]
    weights |= {name: np.zeros(2, np.float32) for name in extra}
    for call in (lambda m, w: check_weights(weight_specs(m), w), load_weights):
        with pytest.raises(ValueError) as caught:
            call(model, weights)
        text = str(caught.value)
        assert "\n" not in text
        assert all(f"missing {name}" in text for name in missing)
        assert all(f"extra {name}" in text for name in extra)
        assert all(f"{name} is {weights[name].shape}, expected {before[name].shape}" in text for name in odd)
        assert text.count(";") == 5
    after = flat_weights(model)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_transposed_weight_is_misshapen() -> None:
    weights = dict(tiny.random_weights(4))
    weights["gate/squeeze_w"] = weights["gate/squeeze_w"].T
    with pytest.raises(ValueError, match="gate/squeeze_w"):
        check_weights(weight_specs(tiny.model(0)), weights)


def test_weights_that_fit_an_abstract_model_pass() -> None:
    check_weights(weight_specs(abstract_model(tiny.MODEL, tiny.SCHEMA, tiny.ITEMS + 1)), tiny.random_weights(4))
    with pytest.raises(ValueError, match=r"item is .*; item_bias is"):
        check_weights(weight_specs(abstract_model(tiny.MODEL, tiny.SCHEMA, tiny.ITEMS)), tiny.random_weights(4))


KINDS: tuple[Literal["categorical", "numeric", "bits"], ...] = ("categorical", "numeric", "bits")


@st.composite
def schemas(draw: st.DrawFn) -> FeatureSchema:
    def features(most: int) -> tuple[Feature, ...]:
        kinds = draw(st.lists(st.sampled_from(KINDS), max_size=most))
        return tuple(Feature(f"f{i}", kind, 0 if kind == "numeric" else 5) for i, kind in enumerate(kinds))

    return FeatureSchema(
        blocks=tuple(Block(f"b{i}") for i in range(draw(st.integers(1, 3)))),
        item_features=features(3),
        user_features=features(2),
        context_features=features(2),
    )


@settings(max_examples=25)
@given(schemas(), st.sampled_from([1, 4]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_unpacking_inverts_the_views_of_a_slot(schema: FeatureSchema, align: int, requests: int, seed: int) -> None:
    layout = slot_layout(schema, Layout(align=align, max_requests=requests), Bucket(12, 4))
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, layout.words).astype(np.int32)
    views = layout.views(words)
    fields = unpack(jax.device_put(words), layout)
    assert list(fields) == list(views)
    for name, view in views.items():
        found = np.asarray(fields[name])
        assert (found.dtype, found.shape) == (view.dtype, view.shape)
        assert found.tobytes() == view.tobytes()
