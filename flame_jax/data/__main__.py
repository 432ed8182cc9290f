"""Interaction logs into a feature store.

`python -m flame_jax.data import --config FILE` imports a log of one's own as the section `data` says;
`python -m flame_jax.data import DATASET --store DIR` imports a known data set.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from flame_jax.commandline import load, refuse
from flame_jax.config import Config, DataConfig
from flame_jax.data.errors import DataError, require_pyarrow
from flame_jax.data.known import DATASETS
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError

PROG = "python -m flame_jax.data"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["import"] and _names_settings(args[1:]):
        import_log(load(args[1:], prog=f"{PROG} import"))
    else:
        _import_data_set(args)


def _names_settings(args: list[str]) -> bool:
    """Whether the arguments are those of `commandline.load`: `--config`, or a setting such as `--data.events`."""
    return any(arg.split("=")[0] == "--config" or (arg.startswith("--") and "." in arg.split("=")[0]) for arg in args)


def import_log(config: Config) -> None:
    """Import the log that the section `data` names. Ends the process with status 1 and one line if it can't be."""
    try:
        require_pyarrow()
    except DataError as error:
        refuse(PROG, str(error), status=1)
    from flame_jax.data.plan import make_plan
    from flame_jax.data.sources import read_table
    from flame_jax.data.tables import import_tables

    data, store = config.data, config.store.path
    try:
        if not data.events:
            raise DataError("data.events names no log")
        _refuse_existing(store)
        plan = make_plan(config.schema, data, items=bool(data.items), users=bool(data.users))
        events = read_table(data.events, plan.events, "events")
        items = read_table(data.items, plan.items, "items") if plan.items else None
        users = read_table(data.users, plan.users, "users") if plan.users else None
        counts = import_tables(store, config.schema, data, events, items, users)
    except (DataError, StoreError) as error:
        refuse(PROG, str(error), status=1)
    print(f"imported {counts.users} users, {counts.items} items and {counts.events} events into {store}")


def _refuse_existing(path: str) -> None:
    """Raise StoreError if a store is there, before a long log is read in vain."""
    try:
        LmdbStore(path).close()
    except StoreError:
        return  # none, or one that is unfinished or damaged: its writer will say
    raise StoreError(f"store {path} exists already; remove the folder to import again")


def _import_data_set(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=PROG, description="Fill a feature store from an interaction log.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importer = commands.add_parser(
        "import",
        help="import a log into a new LMDB store",
        usage=f"{PROG} import --config FILE [--data.FIELD VALUE ...]\n       {PROG} import DATASET --store DIR",
        description="Import a log as a configuration's section `data` says, or a known data set.",
        epilog=f"data: {inspect.getdoc(DataConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importer.add_argument("dataset", choices=sorted(DATASETS), help="a known data set")
    importer.add_argument("--store", required=True, metavar="DIR", help="folder of the data set's new store")
    known = parser.parse_args(args)
    try:
        users, items, events = DATASETS[known.dataset].write(known.store)
    except (DataError, StoreError) as error:
        refuse(PROG, str(error), status=1)
    print(f"imported {users} users, {items} items and {events} events into {known.store}")


if __name__ == "__main__":
    main()
