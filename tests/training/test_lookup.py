"""Vocabularies and columns made from a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from flame_jax.config import Config, HeadConfig, ModelConfig, TrainConfig
from flame_jax.feature_config import StoreConfig
from flame_jax.models.checkpoint import CheckpointError, load_checkpoint
from flame_jax.models.registry import make_ranker
from flame_jax.packing import Layout
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema
from flame_jax.train import main
from flame_jax.training.examples import Dataset
from flame_jax.training.lookup import fill_columns, make_vocabularies
from flame_jax.training.loop import check_columns
from flame_jax.vocabulary import Vocabularies, Vocabulary
from tests import tiny

SCHEMA = FeatureSchema(
    actions=2,
    block_length=8,
    item_features=(
        Feature("maker", "id", 2),
        Feature("shop", "id", 9, "table"),
        Feature("price", "numeric", 0, "table"),
        Feature("offer", "id", 3, "request"),
    ),
    user_features=(Feature("city", "id", 2),),
    context_features=(Feature("campaign", "id", 4),),
)
MAKERS = {11: 700, 12: 700, 13: -1, 14: 800, 15: 600, 16: 800}
"""By item; 700 and 800 have two items each."""
CITIES = {"a": 5, "b": 2**40, "c": 5, "d": -1, "e": 6, "f": 2**40}


def write(path: Path) -> None:
    rows = np.zeros(len(MAKERS), item_dtype(SCHEMA))
    rows["id"], rows["maker"] = list(MAKERS), list(MAKERS.values())
    rows["shop"], rows["price"] = [2**33 + item % 3 for item in MAKERS], [item / 8 for item in MAKERS]
    history = History(np.array([11, 12, 13, 14, 15, 99] * 4), np.arange(24) % 2, np.arange(24) * 10)
    with LmdbWriter(path, SCHEMA) as writer:
        writer.put_items(rows)
        writer.put_users((u, history, feature_row(SCHEMA.user_features, {"city": c})) for u, c in CITIES.items())
        writer.finish("test")


def dataset(path: Path) -> Dataset:
    write(path)
    store = LmdbStore(path, SCHEMA)
    found = Dataset(store, SCHEMA, {"score": [1]})
    store.close()
    return found


def test_vocabularies_hold_the_most_frequent_keys(tmp_path: Path) -> None:
    found = make_vocabularies(dataset(tmp_path / "store"), np.array([99, 11, 12, 13, 14, 15, 11]))
    assert found.items.keys.tolist() == [11, 12, 13, 14, 15, 99]
    assert {name: vocabulary.keys.tolist() for name, vocabulary in found.features.items()} == {
        "item.maker": [600, 700],  # item 16, whose maker would be 800's second, was not trained on
        "item.shop": [2**33, 2**33 + 1, 2**33 + 2],
        "item.offer": [],
        "user.city": [5, 2**40],
        "context.campaign": [],
    }
    found.check(SCHEMA)


def test_columns_hold_the_stored_values_by_item_row(tmp_path: Path) -> None:
    data = dataset(tmp_path / "store")
    names = ("item.maker", "item.offer", "user.city", "context.campaign")
    features = {name: Vocabulary(np.empty(0, np.int64)) for name in names}
    features["item.shop"] = Vocabulary(np.array([2**33 + 2, 2**33]))
    vocabularies = Vocabularies(Vocabulary(np.array([12, 99, 14])), features)
    model = make_ranker(tiny.MODEL, SCHEMA, vocabularies.items.rows, rngs=nnx.Rngs(0))
    fill_columns(model, data, vocabularies)
    # Rows: out of vocabulary, 12, 14, and 99, which the store lacks.
    assert np.asarray(model.columns["item.price"][...]).tolist() == [0.0, 1.5, 1.75, 0.0]
    assert np.asarray(model.columns["item.shop"][...]).tolist() == [0, 1, 2, 0]


def test_a_model_with_every_source_trains_and_resumes(tmp_path: Path) -> None:
    write(tmp_path / "store")
    config = Config(
        store=StoreConfig(str(tmp_path / "store")),
        schema=SCHEMA,
        layout=Layout(align=8, max_requests=8),
        model=ModelConfig(width=8, layers=1, heads=1, head_dim=8, ffn=8, head=HeadConfig(1, 4, 4)),
        train=TrainConfig(
            checkpoint=str(tmp_path / "checkpoint"),
            label_actions={"score": [1]},
            epochs=1,
            tokens=128,
            candidates=64,
            chunk=8,
            negatives=2,
            unknown_rate=0.5,
        ),
    )
    main(["--config", tiny.write_config(config, tmp_path / "config.yaml")])
    one = load_checkpoint(tmp_path / "checkpoint")
    main(["--config", tiny.write_config(config, tmp_path / "config.yaml"), "--train.epochs", "2"])
    two = load_checkpoint(tmp_path / "checkpoint")
    assert (one.step, two.step) == (1, 2)
    for name, weight in one.weights.items():
        if name.startswith("columns/"):
            assert np.array_equal(two.weights[name], weight), "training must leave columns alone"
            assert weight.any()
    for table in ("features/item.maker", "features/item.shop", "features/user.city"):
        assert not np.array_equal(one.weights[table], two.weights[table])
    # Ids are forgotten at times, so that the row of unknown ones is trained too; a column's id is the item's own.
    assert not np.array_equal(one.weights["features/item.maker"][0], two.weights["features/item.maker"][0])
    assert dataclasses.asdict(one.model) == dataclasses.asdict(two.model)
    for table in ("features/item.offer", "features/context.campaign"):
        assert not two.weights[table][1:].any(), "a value that training never sees must not move a score"
    other = dataclasses.replace(two, weights={**two.weights, "columns/item.price": np.zeros(7, np.float32)})
    with pytest.raises(CheckpointError, match=r"the store's item\.price changed"):
        check_columns(other, dict(two.weights), tmp_path)
