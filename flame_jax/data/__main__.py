"""Interaction logs into a feature store, and one store into another.

`python -m flame_jax.data import --config FILE` imports a log of one's own as the section `data` says;
`python -m flame_jax.data import DATASET --store DIR` imports a known data set;
`python -m flame_jax.data load --from DIR --store URL` copies an imported store to a server.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import closing

from flame_jax.commandline import load, refuse
from flame_jax.config import Config
from flame_jax.data.errors import DataError, require_pyarrow
from flame_jax.data.known import DATASETS
from flame_jax.feature_config import DataConfig, StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError
from flame_jax.pda.store_url import redacted

PROG = "python -m flame_jax.data"
URL = "FLAME_STORE__URL"
"""The variable that sets `store.url`, so that a password need not stand in a command or a file."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["import"] and _names_settings(args[1:]):
        import_log(load(args[1:], prog=f"{PROG} import"))
    else:
        known = _parser().parse_args(args)
        try:
            known.run(known)
        except (DataError, StoreError) as error:
            refuse(PROG, str(error), status=1)


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


def _import_data_set(args: argparse.Namespace) -> None:
    users, items, events = DATASETS[args.dataset].write(args.store)
    print(f"imported {users} users, {items} items and {events} events into {args.store}")


def _load(args: argparse.Namespace) -> None:
    from flame_jax.data.load import load_store

    with closing(LmdbStore(args.source)) as source:
        config = StoreConfig(url=args.store, prefix=args.prefix)
        written = load_store(source, config, restart=args.restart)
    print(f"copied {written} values from {args.source} into {redacted(args.store)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Fill a feature store.")
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
    importer.set_defaults(run=_import_data_set)
    loader = commands.add_parser(
        "load",
        help="copy a store to a server that speaks the Redis protocol",
        description="Copy an imported store to a server that speaks the Redis protocol, such as Valkey. What broke off "
        "is taken up again where it was; a store that is there is refreshed while it serves.",
    )
    url = os.environ.get(URL, "")
    loader.add_argument("--from", dest="source", default=StoreConfig().path, metavar="DIR", help="the LMDB store")
    loader.add_argument(
        "--store", default=url, required=not url, metavar="URL", help=f"store.url; by default what {URL} holds"
    )
    loader.add_argument("--prefix", default=StoreConfig().prefix, help="store.prefix (default: %(default)s)")
    loader.add_argument("--restart", action="store_true", help="begin anew, where another store's copy broke off")
    loader.set_defaults(run=_load)
    return parser


if __name__ == "__main__":
    main()
