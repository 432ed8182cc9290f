"""What a model looks ids up in, made from the training events: vocabularies, and columns of item features."""

from __future__ import annotations

import numpy as np

from flame_jax.models.ranker import Ranker
from flame_jax.schema import Feature, feature_field
from flame_jax.training.examples import Dataset
from flame_jax.vocabulary import Vocabularies, Vocabulary


def make_vocabularies(dataset: Dataset, items: np.ndarray) -> Vocabularies:
    """Vocabularies of the items trained on, and of the most frequent keys of their and of the users' id features.

    Context features are no part of a store's events: theirs are empty.

    Args:
        items: int64[n], item ids of the training events.
    """
    schema = dataset.schema
    vocabulary = Vocabulary(np.unique(items))
    rows, _ = dataset.items(vocabulary.keys)
    features = {}
    for group, feature in schema.features:
        if feature.kind != "id":
            continue
        keys = np.empty(0, np.int64)
        if group == "item" and feature.source != "request":
            keys = rows[feature.name]
        elif group == "user":
            keys = np.array([record.features[feature.name] for _, record in dataset.users], np.int64)
        features[feature_field(group, feature)] = Vocabulary.of_most_frequent(keys, feature.size)
    return Vocabularies(vocabulary, features)


def fill_columns(model: Ranker, dataset: Dataset, vocabularies: Vocabularies) -> None:
    """Put the stored values of `table` features into a model's columns; the out-of-vocabulary row keeps its 0."""
    rows, _ = dataset.items(vocabularies.items.keys)
    for feature in dataset.schema.item_features:
        if feature.source == "table":
            column = np.zeros(vocabularies.items.rows, feature.dtype)
            column[1:] = _as_read(feature, rows[feature.name], vocabularies)
            model.columns[feature_field("item", feature)][...] = column


def _as_read(feature: Feature, values: np.ndarray, vocabularies: Vocabularies) -> np.ndarray:
    if feature.kind == "id":
        return vocabularies.features[feature_field("item", feature)].lookup(values)
    return values
