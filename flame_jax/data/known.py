"""Data sets that importers of ours know, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flame_jax.data import completejourney, movielens
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError


class KnownDataset(NamedTuple):
    """One of them.

    Attributes:
        write: imports it into a new store and returns how many users, items and events. Raises DataError, StoreError.
        config: the configuration that goes with it, in a checkout.
    """

    write: Callable[[str | Path], tuple[int, int, int]]
    config: str

    def ensure(self, store: str | Path) -> None:
        """Import it, unless a store that can be read is there. Raises DataError, StoreError."""
        try:
            LmdbStore(store).close()
        except StoreError:
            self.write(store)


DATASETS = {
    movielens.NAME: KnownDataset(movielens.import_ml_100k, "configs/demo.yaml"),
    completejourney.NAME: KnownDataset(completejourney.import_completejourney, "configs/completejourney.yaml"),
}
