"""What is configurable of stores, of the cache, and of logs that are imported; see `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def at_least(least: int, section: str, config: object, *names: str) -> None:
    """Raise ValueError unless these fields of a section are at least so much."""
    for name in names:
        if not getattr(config, name) >= least:  # so that NaN fails too
            raise ValueError(f"{section}.{name} must be at least {least}, not {getattr(config, name)}")


LONGEST_SECONDS = 1e9
"""That something may be kept or wait: some thirty years."""


def some_seconds(section: str, config: object, *names: str) -> None:
    """Raise ValueError unless these fields of a section are a time that can be waited for."""
    for name in names:
        if not 0 < getattr(config, name) <= LONGEST_SECONDS:
            raise ValueError(f"{section}.{name} must lie in (0, {LONGEST_SECONDS:g}], not {getattr(config, name)}")


@dataclass(frozen=True)
class StoreConfig:
    """Where features are read from.

    Attributes:
        path: folder of the LMDB store, which training reads, and the server too if there is no url.
        url: a server that speaks the Redis protocol: redis://HOST:PORT/DB, rediss:// with TLS (its query may name
            ssl_ca_certs, ssl_certfile and ssl_keyfile), or unix:///PATH. It may hold a user and a password, which are
            never logged; FLAME_STORE__URL keeps them out of files.
        prefix: how the names of its keys begin.
        timeout_ms: how long a server may take to answer.
        connections: to a server at most; calls beyond wait for one.
    """

    path: str = "runs/demo/store"
    url: str = ""
    prefix: str = "flame"
    timeout_ms: float = 20.0
    connections: int = 16

    def __post_init__(self) -> None:
        at_least(1, "store", self, "connections")
        if not self.prefix or ":" in self.prefix:
            raise ValueError(f"store.prefix must be a name without colons, not {self.prefix!r}")
        if not self.timeout_ms > 0:
            raise ValueError(f"store.timeout_ms must be positive, not {self.timeout_ms}")


@dataclass(frozen=True)
class CacheConfig:
    """Items' features, kept in the server's memory; users' are not, since few come back soon.

    Attributes:
        mode: `off`: every call asks the store; `sync`: what is missing or too old is waited for; `async`: what is too
            old is used and asked for again, what is missing counts as unknown and is asked for, and calls are
            answered without the store when it fails.
        mib: memory for features at most, in MiB.
        ttl_seconds: age at which an entry is too old; each one's is up to a tenth shorter, by chance.
        absent_ttl_seconds: the same of items that the store does not have.
    """

    mode: Literal["off", "sync", "async"] = "off"
    mib: int = 256
    ttl_seconds: float = 60.0
    absent_ttl_seconds: float = 10.0

    def __post_init__(self) -> None:
        at_least(1, "cache", self, "mib")
        some_seconds("cache", self, "ttl_seconds", "absent_ttl_seconds")


@dataclass(frozen=True)
class DataConfig:
    """What is imported into the store: a log of events, and what its columns mean.

    Attributes:
        name: what the store says it holds.
        events: the log: a Parquet or CSV file (.parquet, .csv, .csv.gz), or a folder of parts, read by name.
        items: a table of items, likewise; when empty, an item's features are columns of the log and its newest
            event's values count.
        users: a table of users, likewise; when empty, as with items.
        user_column: a user's key, in the log and in users: strings or integers.
        item_column: an item's id, in the log and in items: integers, or strings that are hashed to int64.
        time_column: an event's time: integers or floats in time_unit, timestamps (UTC without a zone) or dates.
        action_column: an event's action; when empty, every event has action 0.
        actions: values of action_column in the order of the schema's actions; when empty, the column holds
            integers in [0, schema.actions).
        title_column: an item's display title, where its features are; when empty, items have none, or the
            strings that their ids were.
        columns: column of a feature whose name differs; `item.NAME` or `user.NAME` where both have the feature.
        time_unit: unit of times that are numbers.
        unsorted: what to do when a user's events go back in time from row to row: refuse the log, or sort them.
    """

    name: str = "log"
    events: str = ""
    items: str = ""
    users: str = ""
    user_column: str = "user"
    item_column: str = "item"
    time_column: str = "timestamp"
    action_column: str = ""
    actions: tuple[str | int | float, ...] = ()
    title_column: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    unsorted: Literal["refuse", "sort"] = "refuse"

    def __post_init__(self) -> None:
        for name in ("name", "user_column", "item_column", "time_column"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} is empty")
        if not all(self.columns.values()):
            raise ValueError("data.columns names an empty column")
        if self.actions and not self.action_column:
            raise ValueError("data.actions are values of data.action_column, which is empty")
        text = any(isinstance(action, str) for action in self.actions)
        if len({str(action) if text else action for action in self.actions}) != len(self.actions):
            raise ValueError(f"data.actions must be distinct, not {list(self.actions)}")
