"""A bench with several modes on one command line: it measures, prints a table, and writes results and drawings."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.environment import describe

PATHS = ("--out", "--artifacts")
"""Options whose values say nothing of what was measured."""


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


def run(module: str, modes: Mapping[str, Mode], parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Measure one mode, print it, and write MODE.json and its drawings.

    Args:
        parser: knows the options of the modes; the modes themselves, `--out` and `--commit` are added.
    """
    parser.allow_abbrev = False
    what = parser.add_mutually_exclusive_group(required=True)
    for name, mode in modes.items():
        what.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=mode.help)
    parser.add_argument("--out", type=Path, metavar="DIR", help="takes the result as MODE.json")
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args = parser.parse_args(argv)
    chosen = modes[args.mode]
    about = describe(_command(module, argv), args.commit)
    result = chosen.run(args)
    print(chosen.table(result), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(about | result), indent=1, allow_nan=False)
        Path(args.out, f"{args.mode}.json").write_text(text + "\n")
        for name, drawing in chosen.plots(result).items():
            Path(args.out, f"{name}.svg").write_text(drawing)


def _command(module: str, argv: Sequence[str]) -> str:
    """What was asked for, without this machine's paths."""
    words = ["python", "-m", module]
    given = iter([part for word in argv for part in word.split("=", 1)])
    for word in given:
        if word == "--commit":
            next(given)
            continue
        words.append(word)
        if word in PATHS:
            next(given)
            words.append("DIR")
    return shlex.join(words)


def _plain(value: Any) -> Any:
    """As JSON has it: no numbers that are none."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
