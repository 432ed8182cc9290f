"""Pieces of the training loop that a whole run would hide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flame_jax.config import Config, TrainConfig
from flame_jax.models.params import Column
from flame_jax.models.serving import flat_weights
from flame_jax.packing import Bucket
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.schema import Feature
from flame_jax.train import Slice, columns
from flame_jax.training.examples import Dataset, Packer, held_out_examples
from flame_jax.training.loop import decayed, forget_ids, predict
from flame_jax.training.negatives import NO_ITEM
from tests import tiny

LABELS = {"like": [3, 4], "love": [4]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("loop") / "store"
    tiny.write_store(path)
    store = LmdbStore(path, tiny.SCHEMA)
    found = Dataset(store, tiny.SCHEMA, LABELS)
    store.close()
    return found


def negatives_of(dataset: Dataset, count: int) -> list[np.ndarray]:
    """Negatives that tell their event: and some that could not be drawn."""
    drawn = []
    for number, length in enumerate(dataset.lengths()):
        rows = tiny.ITEM_IDS[(np.arange(length)[:, None] * 3 + np.arange(count) + number) % tiny.ITEMS]
        drawn.append(np.where(np.arange(length)[:, None] % 4 == np.arange(count), NO_ITEM, rows))
    return drawn


def test_each_event_is_followed_by_its_negatives_and_their_labels_are_0(dataset: Dataset) -> None:
    drawn = negatives_of(dataset, 2)
    found = dataset.candidates(5, 3, 9, drawn)
    history = tiny.user_history(5)
    items, labels = [], []
    for at in range(3, 9):
        items.append(int(history.item_ids[at]))
        labels.append([history.actions[at] >= 3, history.actions[at] == 4])
        for item in drawn[5][at].tolist():
            if item != NO_ITEM:
                items.append(item)
                labels.append([False, False])
    assert found.items.tolist() == items
    assert found.labels.astype(bool).tolist() == labels


def test_predictions_line_up_with_the_slice_when_there_are_negatives(dataset: Dataset) -> None:
    """Scored in small pieces and in company, every candidate gets the score that it gets when scored alone."""
    settings = TrainConfig(tokens=128, candidates=32, negatives=2, tiles_at_once=4)
    config = replace(Config(), schema=tiny.SCHEMA, model=tiny.MODEL, layout=tiny.LAYOUT, train=settings)
    drawn, ends = negatives_of(dataset, 2), dataset.lengths()
    starts = np.where(np.arange(tiny.USERS) < 3, ends - 14, ends)
    model = tiny.model(3)
    packer = Packer(dataset, tiny.vocabularies(), tiny.LAYOUT, Bucket(128, 32))
    held = columns(dataset, starts, ends, drawn)
    scores = predict(config, model, packer, starts, ends, drawn)
    assert scores.shape == held.labels.shape
    assert len(held_out_examples(starts, ends, dataset.moments(), most=10)) == 6, "a user's slice takes two pieces"
    for at in range(0, len(held.items), 7):
        user = int(held.users[at])
        twin = [h.copy() for h in drawn]
        twin[user][:] = held.items[at]
        one = np.where(np.arange(tiny.USERS) == user, starts, ends)
        alone = predict(config, model, packer, one, np.minimum(one + 1, ends), twin)
        np.testing.assert_allclose(alone[1], scores[at], rtol=1e-5, err_msg=f"candidate {at}")


def test_what_the_user_took_before_is_counted_up_to_the_start(dataset: Dataset) -> None:
    starts, ends = np.full(tiny.USERS, 6), np.full(tiny.USERS, 9)
    drawn = negatives_of(dataset, 1)
    held: Slice = columns(dataset, starts, ends, drawn)
    for user, item, before in zip(held.users.tolist(), held.items.tolist(), held.before.tolist(), strict=True):
        history = tiny.user_history(user)
        earlier = history.item_ids[history.timestamps < history.timestamps[6]]
        assert before == earlier.tolist().count(item)
    assert held.before.any()


def test_only_ids_are_forgotten_and_as_often_as_asked() -> None:
    schema = replace(
        tiny.SCHEMA,
        item_features=(
            Feature("maker", "id", 9),
            Feature("genre", "categorical", 9),
            Feature("shop", "id", 9, "table"),
        ),
        user_features=(Feature("city", "id", 9),),
        context_features=(),
        interleave=True,
    )
    config = replace(Config(), schema=schema, train=TrainConfig(unknown_rate=0.25))
    items = np.where(np.arange(4000) % 2, -1, 7).astype(np.int32)
    packed = {
        "item": jnp.asarray(items)[None],
        "action": jnp.full((1, 4000), 2),
        "item.maker": jnp.full(4000, 3),
        "item.genre": jnp.full(4000, 4),
        "user.city": jnp.full(4000, 5),
    }
    found = {name: np.asarray(value) for name, value in forget_ids(packed, config, jax.random.key(0)).items()}
    for name in ("action", "item.genre"):
        assert np.array_equal(found[name], packed[name])
    for name, was in (("item.maker", 3), ("user.city", 5)):
        assert set(found[name].tolist()) == {0, was}
        assert (found[name] == 0).mean() == pytest.approx(0.25, abs=0.03)
    assert (found["item"][0, 1::2] == -1).all(), "rows that hold an action stay without an item"
    assert (found["item"][0, ::2] == 0).mean() == pytest.approx(0.25, abs=0.04)
    assert not np.array_equal(found["item.maker"] == 0, found["user.city"] == 0)


def test_matrices_and_tables_decay_and_nothing_else_does(tmp_path: Path) -> None:
    model = tiny.model(0)
    weights = nnx.state(model, nnx.Param)
    assert not jax.tree.leaves(nnx.state(model, Column))
    flags = dict(zip(flat_weights(model), jax.tree.leaves(decayed(weights)), strict=True))
    kept = {name.rpartition("/")[2] for name, decays in flags.items() if not decays}
    assert {"item_bias", "temperature", "bias", "norm1_scale", "norm1_shift", "qkv_b", "logit_b"} <= kept
    for name in ("item", "action", "layers/qkv_w", "head/expert_w", "features/item.genres", "features/user.age"):
        assert flags[name]
