"""Data sets that importers of ours know, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flame_jax.data import completejourney, movielens
from flame_jax.data.errors import DataError
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError


class KnownDataset(NamedTuple):
    """One of them.

    Attributes:
        name: what its store says it holds.
        write: imports it into a new store and returns how many users, items and events. Raises DataError, StoreError.
        config: the configuration that goes with it, in a checkout.
    """

    name: str
    write: Callable[[str | Path], tuple[int, int, int]]
    config: str

    def ensure(self, store: str | Path) -> None:
        """Import it, unless a store that can be read is there.

        Raises:
            DataError: the data set isn't installed, or the store holds another one.
            StoreError: the store can't be written.
        """
        try:
            found = LmdbStore(store)
        except StoreError:
            self.write(store)
            return
        held = found.description.dataset
        found.close()
        if held != self.name:
            raise DataError(f"store {store} holds {held!r}, not {self.name!r}: name another with --store.path")


DATASETS = {
    movielens.NAME: KnownDataset(movielens.NAME, movielens.import_ml_100k, "configs/demo.yaml"),
    completejourney.NAME: KnownDataset(
        completejourney.NAME, completejourney.import_completejourney, "configs/completejourney.yaml"
    ),
}
