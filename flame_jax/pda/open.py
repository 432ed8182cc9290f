"""The store that a configuration names."""

from __future__ import annotations

from flame_jax.feature_config import StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import Store


async def open_store(config: StoreConfig) -> Store:
    """The server at `url`, or the LMDB folder at `path` if there is none.

    Raises:
        StoreError: it isn't there, doesn't answer, or holds no finished store.
    """
    if not config.url:
        return LmdbStore(config.path)
    from flame_jax.pda.redis_store import RedisStore  # redis-py is an extra

    return await RedisStore.open(config)
