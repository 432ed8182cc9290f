"""Honest baselines: a smoothed item mean, logistic regression on user and item, and on how often it was taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import expit

TOLERANCE = 1e-7
"""Largest gradient at which the fit stops. At scikit-learn's 1e-4 some items' biases are off by a half."""


@dataclass(frozen=True)
class Biases:
    """A bias for each id seen in training.

    Attributes:
        keys: int64[K], external ids, ascending, without repeats; at least one.
        values: float32[K], in log-odds, in the order of `keys`.
    """

    keys: NDArray[np.int64]
    values: NDArray[np.float32]

    def lookup(self, ids: ArrayLike) -> NDArray[np.float32]:
        """float32[M]: the biases of ids int[M]; 0 where an id was not seen in training."""
        wanted = np.asarray(ids)
        at, seen = _find(self.keys, wanted)
        return np.where(seen, self.values[at], np.float32(0))


@dataclass(frozen=True)
class BiasModel:
    """P(label) = sigmoid(intercept + user bias + item bias).

    Attributes:
        intercept: log-odds of a user and an item of bias 0.
        user: biases by external user id.
        item: biases by external item id.
    """

    intercept: float
    user: Biases
    item: Biases

    def predict(self, users: ArrayLike, items: ArrayLike) -> NDArray[np.float64]:
        """The probability that each event's label is true.

        Args:
            users: int[M], external ids.
            items: int[M], external ids. A user or an item not seen in training has bias 0.

        Returns:
            float64[M] in (0, 1).

        Raises:
            ValueError: the arrays are not one-dimensional and of one length.
        """
        who, what = _columns(users=users, items=items)
        logits = self.intercept + self.user.lookup(who).astype(np.float64) + self.item.lookup(what)
        return np.asarray(expit(logits), np.float64)


def item_mean(
    train_items: ArrayLike, train_labels: ArrayLike, test_items: ArrayLike, *, strength: float
) -> NDArray[np.float64]:
    """The share of true labels of each test item in training, pulled towards the share of all items.

    Args:
        train_items: int[N], external ids.
        train_labels: bool[N], or 0 and 1.
        test_items: int[M], external ids.
        strength: events that the global mean counts for: (sum + strength * global) / (count + strength).

    Returns:
        float64[M] in [0, 1]; the global mean where an item was not seen in training.

    Raises:
        ValueError: the training arrays are empty, or not one-dimensional and of one length, a label is neither
            0 nor 1, or `strength` is negative or not finite.
    """
    items, labels = _columns(train_items=train_items, train_labels=train_labels)
    truth = _training_labels(labels)
    if not (np.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength must be finite and at least 0, not {strength}")
    keys, inverse, counts = np.unique(items, return_inverse=True, return_counts=True)
    everything = truth.mean()
    means = (np.bincount(inverse, weights=truth) + strength * everything) / (counts + strength)
    at, seen = _find(keys, np.asarray(test_items))
    return np.where(seen, means[at], everything)


def fit_bias_model(
    train_users: ArrayLike, train_items: ArrayLike, train_labels: ArrayLike, *, regularisation_c: float
) -> BiasModel:
    """Logistic regression on the one-hot user and the one-hot item, with an L2 penalty on both.

    Args:
        train_users: int[N], external ids.
        train_items: int[N], external ids.
        train_labels: bool[N], or 0 and 1; both must occur.
        regularisation_c: scikit-learn's C, the inverse of the penalty: smaller pulls biases closer to 0. The
            intercept is not penalised.

    Raises:
        ValueError: the arrays are empty, or not one-dimensional and of one length, a label is neither 0 nor 1,
            only one label occurs, or `regularisation_c` is not positive and finite.
    """
    users, items, labels = _columns(train_users=train_users, train_items=train_items, train_labels=train_labels)
    truth = _training_labels(labels)
    if truth.all() or not truth.any():
        raise ValueError("training labels must hold both 0 and 1")
    if not (np.isfinite(regularisation_c) and regularisation_c > 0):
        raise ValueError(f"regularisation_c must be positive and finite, not {regularisation_c}")
    user_keys, user_at = np.unique(users, return_inverse=True)
    item_keys, item_at = np.unique(items, return_inverse=True)
    from sklearn.linear_model import LogisticRegression  # of the extra `demo`, needed only here
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    fitted = LogisticRegression(C=regularisation_c, tol=TOLERANCE, max_iter=1000)
    # The vectors are short: BLAS on many threads spends its time waiting for them, twelve cores' worth of it.
    with threadpool_limits(1):
        fitted.fit(_one_hot(user_at, item_at, len(user_keys), len(item_keys)), truth)
    weights = fitted.coef_[0].astype(np.float32)
    return BiasModel(
        intercept=float(fitted.intercept_[0]),
        user=Biases(user_keys.astype(np.int64), weights[: len(user_keys)]),
        item=Biases(item_keys.astype(np.int64), weights[len(user_keys) :]),
    )


@dataclass(frozen=True)
class RepeatModel:
    """P(label) = sigmoid(intercept + slope * log(1 + times the user had taken the item before))."""

    intercept: float
    slope: float

    def predict(self, before: ArrayLike) -> NDArray[np.float64]:
        """float64[M] in (0, 1) of int[M] counts."""
        return np.asarray(expit(self.intercept + self.slope * np.log1p(before)), np.float64)


def fit_repeat_model(before: ArrayLike, labels: ArrayLike) -> RepeatModel:
    """Logistic regression on one number, practically without a penalty.

    Args:
        before: int[N], how often the user of an event had taken its item before.
        labels: bool[N], or 0 and 1; both must occur.

    Raises:
        ValueError: the arrays are empty, or not one-dimensional and of one length, a label is neither 0 nor 1, or
            only one label occurs.
    """
    counts, truth = _columns(before=before, labels=labels)
    truth = _training_labels(truth)
    if truth.all() or not truth.any():
        raise ValueError("training labels must hold both 0 and 1")
    from sklearn.linear_model import LogisticRegression  # of the extra `demo`, needed only here

    fitted = LogisticRegression(C=1e6, tol=TOLERANCE, max_iter=1000).fit(np.log1p(counts)[:, None], truth)
    return RepeatModel(intercept=float(fitted.intercept_[0]), slope=float(fitted.coef_[0, 0]))


def _one_hot(users: NDArray[np.intp], items: NDArray[np.intp], user_count: int, item_count: int) -> csr_array:
    """A sparse [N, user_count + item_count] matrix with two ones in each row."""
    columns = np.stack([users, user_count + items], axis=1).ravel().astype(np.int32)
    ends = np.arange(0, len(columns) + 1, 2, dtype=np.int32)
    shape = (len(users), user_count + item_count)
    return csr_array((np.ones(len(columns)), columns, ends), shape=shape)


def _find(keys: NDArray[Any], ids: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each id is among the sorted keys, and whether it is there at all."""
    at = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
    return at, keys[at] == ids


def _columns(**columns: ArrayLike) -> list[NDArray[Any]]:
    """The columns as one-dimensional arrays of one length."""
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    if any(array.ndim != 1 for array in arrays.values()) or len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"columns must be one-dimensional and of one length, not {shapes}")
    return list(arrays.values())


def _training_labels(labels: NDArray[Any]) -> NDArray[np.bool_]:
    if len(labels) == 0:
        raise ValueError("no training events")
    if not np.all((labels == 0) | (labels == 1)):
        raise ValueError("labels must be 0 or 1")
    return labels.astype(np.bool_)
