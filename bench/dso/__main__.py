"""`python -m bench.dso MODE [--out DIR]`: the dispatcher under load on this machine, or simulated."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.dso import host, overload, simulate, soak, table
from bench.environment import describe

say = partial(print, flush=True)


class Mode(NamedTuple):
    """Something that is measured.

    Attributes:
        run: of the arguments.
        table: Markdown of its result.
        plots: drawings of its result, by name.
    """

    help: str
    run: Callable[[argparse.Namespace], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    plots: Callable[[dict[str, Any]], Mapping[str, str]] = lambda result: {}


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
    what = parser.add_mutually_exclusive_group(required=True)
    for name, mode in MODES.items():
        what.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=mode.help)
    parser.add_argument("--out", metavar="DIR", help="takes the result as MODE.json")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load of --table, --overload (%(default)s)")
    parser.add_argument("--mix", action="append", choices=("paper", "heavy"), help="of --table; both, if not said")
    parser.add_argument(
        "--no-implicit", action="store_true", help="--table without implicit shapes: each is a program to compile"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of --soak (%(default)s)")
    parser.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="takes the models that are built, or has them already"
    )
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args = parser.parse_args(argv)
    mode = MODES[args.mode]
    about = describe(shlex.join(["python", "-m", "bench.dso", f"--{args.mode}", "--out", "DIR"]), args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        args.artifacts = args.artifacts or Path(scratch)
        result = mode.run(args)
    say(mode.table(result))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(about | result), indent=1, allow_nan=False)
        Path(args.out, f"{args.mode}.json").write_text(text + "\n")
        for name, drawing in mode.plots(result).items():
            Path(args.out, f"{name}.svg").write_text(drawing)


def _plain(value: Any) -> Any:
    """As JSON has it: no numbers that are none."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
