"""`python -m bench.dso MODE [--out DIR]`: the dispatcher under load on this machine, or simulated."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import modes
from bench.dso import host, overload, simulate, soak, table
from bench.modes import Mode

say = partial(print, flush=True)


MODES = {
    "table": Mode(
        "FLAME's Table 5 and a heavy-tailed mix: implicit shapes, one padded bucket, the paper's policy and ours",
        lambda args: table.measure(
            say, args.artifacts, seconds=args.seconds, mixes=args.mix, implicit_shapes=not args.no_implicit
        ),
        table.table,
        table.plots,
    ),
    "overload": Mode(
        "more load than there is room for",
        lambda args: overload.measure(say, args.artifacts, seconds=args.seconds),
        overload.table,
    ),
    "host": Mode(
        "what dispatching costs the host, over lanes that take an H100's time and compute nothing",
        lambda args: host.measure(say, seconds=args.seconds),
        host.table,
    ),
    "simulate": Mode(
        "the policies with measured batch times, without a GPU",
        lambda args: simulate.simulate(say),
        simulate.table,
        simulate.plots,
    ),
    "soak": Mode(
        "80 % load for --minutes: memory and stalls",
        lambda args: soak.measure(say, args.artifacts, minutes=args.minutes),
        soak.table,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write MODE.json and its drawings."""
    parser = argparse.ArgumentParser(prog="python -m bench.dso", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load of --table, --overload (%(default)s)")
    parser.add_argument("--mix", action="append", choices=("paper", "heavy"), help="of --table; both, if not said")
    parser.add_argument(
        "--no-implicit", action="store_true", help="--table without implicit shapes: each is a program to compile"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of --soak (%(default)s)")
    with tempfile.TemporaryDirectory() as scratch:
        parser.add_argument(
            "--artifacts", type=Path, metavar="DIR", default=Path(scratch),
            help="takes the models that are built, or has them already",
        )  # fmt: skip
        modes.run("bench.dso", MODES, parser, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
