"""Every kind of store answers alike: LMDB, Valkey, and Redis where the system has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pda.servers import KINDS, running
from flame_jax.data.load import load_store
from flame_jax.feature_config import CacheConfig, StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.open import open_store
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.store import Fetched, StoreError
from flame_jax.schema import FeatureSchema
from tests.pda.stored import AGES, HISTORIES, IDS, SCHEMA, YEARS, ids, write_store

Fetch = Callable[[str, np.ndarray], Fetched]


@pytest.fixture(scope="module", params=["lmdb", *KINDS])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreConfig]:
    """Of a finished store."""
    folder = tmp_path_factory.mktemp("store")
    write_store(folder / "lmdb")
    if request.param == "lmdb":
        yield StoreConfig(str(folder / "lmdb"))
        return
    with running(folder, request.param) as server:
        found = StoreConfig(url=server.url, prefix="shop.é", timeout_ms=2000)
        source = LmdbStore(folder / "lmdb")
        assert load_store(source, found) == len(HISTORIES) + len(IDS) + 2
        source.close()
        yield found


@pytest.fixture(scope="module", params=["off", "sync"])
def fetch(request: pytest.FixtureRequest, config: StoreConfig) -> Iterator[Fetch]:
    """Asks the store, without a cache or through one."""
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        query = FeatureQuery(runner.run(open_store(config)), CacheConfig(request.param))
        stack.callback(lambda: runner.run(query.aclose()))
        yield lambda user, items: runner.run(query.fetch(user, items))


@pytest.mark.parametrize("user", HISTORIES)
def test_users_come_back_with_their_events_and_features(fetch: Fetch, user: str) -> None:
    record = fetch(user, ids()).user
    assert record is not None
    assert record.history.item_ids.tolist() == HISTORIES[user].item_ids.tolist()
    assert record.history.actions.tolist() == HISTORIES[user].actions.tolist()
    assert record.history.timestamps.tolist() == HISTORIES[user].timestamps.tolist()
    assert record.features["age"] == AGES[user]


@settings(max_examples=100)
@given(st.lists(st.sampled_from([*IDS, 1, 8, 2**32, 2**31 - 1, 2**63 - 2, -1, 3 - 2**32, -(2**63)]), max_size=20))
def test_items_come_in_the_order_asked_with_defaults_for_the_unknown(fetch: Fetch, asked: list[int]) -> None:
    fetched = fetch("u", ids(*asked))
    assert fetched.user is not None
    assert fetched.items["id"].tolist() == asked
    assert fetched.found.tolist() == [key in YEARS for key in asked]
    assert fetched.items["year"].tolist() == [YEARS.get(key, 0.0) for key in asked]
    assert not fetched.degraded


@pytest.mark.parametrize("user", ["nobody", "U", "u ", "u\0", "ü"])
def test_an_unknown_user_is_none(fetch: Fetch, user: str) -> None:
    fetched = fetch(user, ids(3))
    assert fetched.user is None
    assert not fetched.user_lost
    assert fetched.found.tolist() == [True]


def test_a_store_says_what_it_holds(config: StoreConfig) -> None:
    async def check() -> None:
        store = await open_store(config)
        assert store.description.dataset == "test"
        store.description.check(SCHEMA, store.name)
        with pytest.raises(StoreError, match="was written for another feature schema"):
            store.description.check(FeatureSchema(), store.name)
        await store.aclose()

    asyncio.run(check())
