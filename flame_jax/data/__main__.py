"""`python -m flame_jax.data import DATASET --store DIR`: interaction logs into a feature store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flame_jax.config import refuse
from flame_jax.data import movielens
from flame_jax.pda.store import StoreError

PROG = "python -m flame_jax.data"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(prog=PROG, description="Fill a feature store from an interaction log.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importer = commands.add_parser("import", help="import a data set into a new LMDB store")
    importer.add_argument("dataset", choices=[movielens.NAME])
    importer.add_argument("--store", required=True, metavar="DIR", help="folder of the new store")
    args = parser.parse_args(argv)
    try:
        users, items, events = movielens.import_ml_100k(args.store)
    except (movielens.DatasetMissing, StoreError) as error:
        refuse(PROG, str(error), status=1)
    print(f"imported {users} users, {items} items and {events} events into {args.store}")


if __name__ == "__main__":
    main()
