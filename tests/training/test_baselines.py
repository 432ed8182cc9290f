"""The baselines: the item mean by hand, the bias model against planted biases."""

from __future__ import annotations

import numpy as np
import pytest

from flame_jax.training.baselines import BiasModel, fit_bias_model, item_mean

USERS = np.array([10**12 + 5, 40, 7], np.int64)
ITEMS = np.array([9, 10**15, 0, 300], np.int64)
USER_BIAS, ITEM_BIAS = np.array([-1.0, 0.0, 1.0]), np.array([1.5, -0.5, 0.5, -1.5])


def planted(repeats: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every user with every item many times, labelled at the planted odds, shuffled."""
    random = np.random.default_rng(0)
    pairs = np.tile(np.stack(np.meshgrid(range(3), range(4)), axis=-1).reshape(-1, 2), (repeats, 1))
    user, item = random.permutation(pairs).T
    odds = 0.7 + USER_BIAS[user] + ITEM_BIAS[item]
    return USERS[user], ITEMS[item], random.random(len(user)) < 1 / (1 + np.exp(-odds))


@pytest.fixture(scope="module")
def model() -> BiasModel:
    return fit_bias_model(*planted(), regularisation_c=100.0)


def test_item_mean_by_hand() -> None:
    # Global mean 3/5. Item 8: 2 of 3. Item 2: 1 of 2. Item 5 is unseen, below, between and above the others.
    items, labels = [8, 2, 8, 8, 2], [True, True, False, True, False]
    found = item_mean(items, labels, [2, 8, 5, 1, 9, 8], strength=2.0)
    expected = [(1 + 1.2) / 4, (2 + 1.2) / 5, 0.6, 0.6, 0.6, (2 + 1.2) / 5]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.dtype == np.float64


def test_item_mean_at_the_ends_of_strength() -> None:
    items, labels = [8, 2, 8, 8, 2], [1, 1, 0, 1, 0]
    np.testing.assert_allclose(item_mean(items, labels, [8, 2, 5], strength=0), [2 / 3, 1 / 2, 3 / 5])
    np.testing.assert_allclose(item_mean(items, labels, [8, 2, 5], strength=1e12), 3 / 5)
    assert item_mean(items, labels, [], strength=1).shape == (0,)


@pytest.mark.parametrize(
    ("items", "labels", "strength", "message"),
    [
        ([1, 2], [1], 1.0, "one length"),
        ([[1, 2]], [[1, 0]], 1.0, "one-dimensional"),
        ([], [], 1.0, "no training events"),
        ([1, 2], [1, 3], 1.0, "0 or 1"),
        ([1, 2], [1, 0], -1.0, "strength"),
        ([1, 2], [1, 0], float("inf"), "strength"),
    ],
)
def test_item_mean_refuses(items: list[int], labels: list[int], strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        item_mean(items, labels, [1], strength=strength)


def test_biases_are_keyed_by_sorted_external_ids(model: BiasModel) -> None:
    for biases, ids in ((model.user, USERS), (model.item, ITEMS)):
        assert biases.keys.tolist() == sorted(ids.tolist())
        assert biases.keys.dtype == np.int64
        assert biases.values.dtype == np.float32
        assert biases.keys.shape == biases.values.shape


def test_bias_model_recovers_planted_biases(model: BiasModel) -> None:
    for biases, ids, bias in ((model.user, USERS, USER_BIAS), (model.item, ITEMS, ITEM_BIAS)):
        found = biases.lookup(ids)
        assert np.argsort(found).tolist() == np.argsort(bias).tolist()
        np.testing.assert_allclose(found - found.mean(), bias, atol=0.15)


def test_predictions_are_the_planted_probabilities(model: BiasModel) -> None:
    user, item = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    expected = 1 / (1 + np.exp(-(0.7 + USER_BIAS[user] + ITEM_BIAS[item])))
    found = model.predict(USERS[user], ITEMS[item])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_unseen_ids_have_no_bias(model: BiasModel) -> None:
    unseen = [1, 8, 10**12, 2**62]
    assert model.item.lookup(unseen).tolist() == model.user.lookup(unseen).tolist() == [0.0] * 4
    neither, new_item, new_user = model.predict([1, 40, 1], [1, 2**62, 9])
    odds = np.array([0.0, model.user.lookup([40])[0], model.item.lookup([9])[0]], np.float64) + model.intercept
    np.testing.assert_allclose([neither, new_item, new_user], 1 / (1 + np.exp(-odds)), rtol=1e-6)


def test_a_stronger_penalty_shrinks_the_biases(model: BiasModel) -> None:
    shrunk = fit_bias_model(*planted(repeats=100), regularisation_c=1e-3)
    assert np.abs(shrunk.item.values).max() < 0.5 * np.abs(model.item.values).max()


@pytest.mark.parametrize(
    ("users", "items", "labels", "c", "message"),
    [
        ([1, 2], [1, 2], [1], 1.0, "one length"),
        ([1, 2], [1], [1, 0], 1.0, "one length"),
        ([], [], [], 1.0, "no training events"),
        ([1, 2], [1, 2], [1, 5], 1.0, "0 or 1"),
        ([1, 2], [1, 2], [1, 1], 1.0, "both"),
        ([1, 2], [1, 2], [1, 0], 0.0, "regularisation_c"),
    ],
)
def test_fit_refuses(users: list[int], items: list[int], labels: list[int], c: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_bias_model(users, items, labels, regularisation_c=c)


def test_predict_refuses_two_lengths(model: BiasModel) -> None:
    with pytest.raises(ValueError, match="one length"):
        model.predict([40, 7], [9])
