"""A finished LMDB store, copied to a server that speaks the Redis protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

from tqdm import tqdm

from flame_jax.feature_config import StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.redis_store import Keys, options, told
from flame_jax.pda.store import Description, StoreError
from flame_jax.pda.store_url import redacted

if TYPE_CHECKING:
    from redis import Redis

BATCH, BATCH_BYTES = 1000, 1 << 18
"""Values in one command at most, and bytes of them, but for the last: a server does nothing else meanwhile."""
TABLES = {"users": "u", "items": "i", "titles": "t"}
"""Of the LMDB store, in the order copied, and the letter in the names of their values."""
SECONDS = 30.0
"""For each answer."""


class _Mark(NamedTuple):
    """How far a copy has come; written together with each batch.

    Attributes:
        source: digest of what is copied.
        done: values copied.
        table: of the last one.
        after: its key, in hexadecimal digits.
    """

    source: str
    done: int = 0
    table: str = "users"
    after: str = ""


def load_store(source: LmdbStore, config: StoreConfig, *, restart: bool = False) -> int:
    """Copy every record, and last the description; a copy that broke off goes on where it was.

    A store that is there already is refreshed value by value while it serves, if it has the same features.

    Args:
        restart: begin anew, where the copy of something else broke off.

    Returns:
        Values written, those of an earlier try not counted.

    Raises:
        StoreError: the server doesn't answer, or holds a store of other features or an unfinished copy of something
            else.
    """
    given, name = options(config.url, SECONDS), redacted(config.url)
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(config.url, **given) as client:
            return _copy(client, name, source, Keys(config.prefix), restart)
    except (RedisError, OSError) as error:
        raise StoreError(f"store {name}: {told(error)}") from error


def _copy(client: Redis, name: str, source: LmdbStore, keys: Keys, restart: bool) -> int:
    counts = {table: source.count(table) for table in TABLES}
    digest = hashlib.sha256(source.description.to_bytes() + json.dumps(counts).encode()).hexdigest()
    there, unfinished = cast(list[bytes | None], client.mget([keys.description, keys.mark]))
    if there is not None:
        Description.parse(there, name).check(source.description.schema, name)
    first = mark = _Mark(digest) if restart else _read_mark(unfinished, digest, name)
    with tqdm(total=sum(counts.values()), initial=mark.done, unit=" values", desc=name) as progress:
        for table in list(TABLES)[list(TABLES).index(mark.table) :]:
            after = bytes.fromhex(mark.after) if table == mark.table else b""
            for batch in _batches(source.raw(table, after)):
                mark = _Mark(digest, mark.done + len(batch), table, batch[-1][0].hex())
                values = {keys.of(TABLES[table], key): value for key, value in batch}
                client.mset(values | {keys.mark: json.dumps(mark).encode()})  # all of it, or nothing
                progress.update(len(batch))
    finish = client.pipeline(transaction=True)
    finish.set(keys.description, source.description.to_bytes())
    finish.delete(keys.mark)
    finish.execute()
    return mark.done - first.done


def _read_mark(blob: bytes | None, digest: str, name: str) -> _Mark:
    if blob is None:
        return _Mark(digest)
    try:
        mark = _Mark(*json.loads(blob))
    except (ValueError, TypeError):
        mark = _Mark("")
    if mark.source != digest or mark.table not in TABLES:
        raise StoreError(f"store {name} holds an unfinished copy of something else: --restart begins anew")
    return mark


def _batches(values: Iterable[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in values:
        batch.append((key, value))
        size += len(key) + len(value)
        if len(batch) >= BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
