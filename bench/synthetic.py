"""`python -m bench.synthetic --artifact DIR --store DIR`: a store of random users that fits an artifact.

For measuring a server of a model whose real data is elsewhere: every item of the artifact's vocabulary, and users whose
histories are drawn from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flame_jax.fke.artifact import Artifact
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.pda.records import item_dtype, user_dtype
from flame_jax.request import History
from flame_jax.schema import Feature, FeatureSchema

NOW = 1_700_000_000


def main(argv: Sequence[str] | None = None) -> None:
    """Write the store."""
    parser = argparse.ArgumentParser(prog="python -m bench.synthetic", description=__doc__)
    parser.add_argument("--artifact", required=True, metavar="DIR")
    parser.add_argument("--store", required=True, metavar="DIR")
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--events", type=int, default=2000, help="of a user at most")
    args = parser.parse_args(argv)
    artifact = Artifact(args.artifact)
    items = artifact.vocabularies().items.keys
    write_store(Path(args.store), artifact.manifest.schema, items, args.users, args.events)


def write_store(path: Path, schema: FeatureSchema, items: np.ndarray, users: int, events: int) -> None:
    """Write `users` random users, u0 to uN, with up to `events` events among int64[n] items, and every item."""
    random = np.random.default_rng(0)
    rows = np.zeros(len(items), item_dtype(schema))
    rows["id"] = items
    for feature in schema.stored_item_features:
        rows[feature.name] = values(feature, len(items), random)
    with LmdbWriter(path, schema) as writer:
        writer.put_items(rows)
        writer.put_users((f"u{n}", history(schema, items, events, random), row(schema, random)) for n in range(users))
        writer.finish("synthetic")


def history(schema: FeatureSchema, items: np.ndarray, events: int, random: np.random.Generator) -> History:
    """A history of half to all of `events` events."""
    count = int(random.integers(events // 2, events + 1))
    times = NOW - np.sort(random.integers(0, 365 * 86400, count))[::-1]
    actions = random.integers(0, schema.actions, count).astype(np.int32)
    return History(random.choice(items, count), actions, times.astype(np.int64))


def row(schema: FeatureSchema, random: np.random.Generator) -> np.ndarray:
    """A user's features."""
    features = np.zeros((), user_dtype(schema))
    for feature in schema.user_features:
        features[feature.name] = values(feature, 1, random)[0]
    return features


def values(feature: Feature, count: int, random: np.random.Generator) -> np.ndarray:
    """Random values in a feature's range."""
    if feature.kind == "numeric":
        return random.normal(size=count).astype(np.float32)
    return random.integers(0, feature.limit, count).astype(feature.stored_dtype)


if __name__ == "__main__":
    main()
