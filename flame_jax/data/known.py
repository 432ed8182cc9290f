"""Data sets that importers of ours know, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flame_jax.data import completejourney, movielens


class KnownDataset(NamedTuple):
    """One of them.

    Attributes:
        write: imports it into a new store and returns how many users, items and events. Raises DataError, StoreError.
        config: the configuration that goes with it, in a checkout.
    """

    write: Callable[[str | Path], tuple[int, int, int]]
    config: str


DATASETS = {
    movielens.NAME: KnownDataset(movielens.import_ml_100k, "configs/demo.yaml"),
    completejourney.NAME: KnownDataset(completejourney.import_completejourney, "configs/completejourney.yaml"),
}
