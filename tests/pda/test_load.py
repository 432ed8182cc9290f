"""Copying a store to a server: what breaks off goes on, and two stores are never mixed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

from bench.pda.servers import running
from flame_jax.data.load import load_store
from flame_jax.feature_config import StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore, LmdbWriter
from flame_jax.pda.redis_store import RedisStore
from flame_jax.pda.store import Description, StoreError
from flame_jax.schema import FeatureSchema
from tests.pda.stored import IDS, SCHEMA, write_store
from tests.pda.test_redis_store import right


class Interrupted(Exception):
    """The copy breaks off."""


def test_a_copy_that_broke_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "lmdb")
    monkeypatch.setattr("flame_jax.data.load.BATCH", 2)
    with running(tmp_path) as server, closing(LmdbStore(tmp_path / "lmdb")) as source:
        config, total = StoreConfig(url=server.url), 3 + len(IDS) + 2
        for stop in (0, 1, 2, 3, 5):
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
            calls, whole = 0, source.raw

            def some(table: str, after: bytes = b"", stop: int = stop) -> Iterator[tuple[bytes, bytes]]:
                nonlocal calls
                for pair in whole(table, after):  # noqa: B023
                    if calls == 2 * stop:
                        raise Interrupted
                    calls += 1
                    yield pair

            with monkeypatch.context() as patch:
                patch.setattr(source, "raw", some)
                with pytest.raises(Interrupted):
                    load_store(source, config)
            with pytest.raises(StoreError, match="incomplete"):
                asyncio.run(RedisStore.open(config))
            written = load_store(source, config)
            assert total - 2 * stop <= written <= total - 2 * stop + 2
            asyncio.run(_checked(config))
        assert load_store(source, config) == total, "a finished one is refreshed"


def test_a_copy_goes_on_with_the_same_import_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame_jax.data.load.BATCH", 2)
    for name in ("first", "second"):
        write_store(tmp_path / name)
    with running(tmp_path) as server:
        config = StoreConfig(url=server.url)
        with closing(LmdbStore(tmp_path / "first")) as source, monkeypatch.context() as patch:
            patch.setattr(source, "raw", lambda table, after=b"": _broken(LmdbStore.raw(source, table, after)))
            with pytest.raises(Interrupted):
                load_store(source, config)
        with closing(LmdbStore(tmp_path / "second")) as other, pytest.raises(StoreError, match="something else"):
            load_store(other, config)
        with closing(LmdbStore(tmp_path / "first")) as source:
            assert load_store(source, config) == 3 + len(IDS) + 2 - 2


def _broken(values: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    for number, pair in enumerate(values):
        if number == 2:
            raise Interrupted
        yield pair


async def _checked(config: StoreConfig) -> None:
    store = await RedisStore.open(config)
    await right(store)
    await store.aclose()


def test_a_copy_does_not_mix_two_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "lmdb")
    other = FeatureSchema(actions=4)
    with LmdbWriter(tmp_path / "other", other) as writer:
        writer.finish("other")
    with running(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        config = StoreConfig(url=server.url)
        with closing(LmdbStore(tmp_path / "lmdb")) as source, closing(LmdbStore(tmp_path / "other")) as stranger:
            client.set("flame:description", Description("test", SCHEMA).to_bytes())
            with pytest.raises(StoreError, match="another feature schema"):
                load_store(stranger, config)
            client.flushall()
            for mark in (b"?", b'["0", 3, "users", ""]', b"[1]"):
                client.set("flame:loading", mark)
                with pytest.raises(StoreError, match="something else"):
                    load_store(source, config)
            load_store(source, config, restart=True)
            assert client.get("flame:loading") is None
    with closing(LmdbStore(tmp_path / "lmdb")) as source, pytest.raises(StoreError, match="connecting to"):
        load_store(source, config)
