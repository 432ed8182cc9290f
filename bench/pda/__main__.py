"""`python -m bench.pda MODE [--out DIR]`: what features cost on this machine."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.environment import describe
from bench.pda import assembly, faults, host_rows, staleness, transfers
from bench.pda import table as ablation
from flame_jax.commandline import load

say = partial(print, flush=True)


def run_assembly(_: argparse.Namespace) -> dict[str, Any]:
    """From features to a record, and into a slot."""
    result = assembly.assembly(say)
    say(assembly.table(result["assembly"]))
    return result


def run_faults(_: argparse.Namespace) -> dict[str, Any]:
    """A store that fails, in the modes of the cache."""
    result = faults.faults(say)
    say(faults.table(result))
    return result


def run_host_rows(_: argparse.Namespace) -> dict[str, Any]:
    """Rows of an item table in host memory; takes 5 GB of memory and of disk."""
    result = host_rows.host_rows(say)
    say(host_rows.table(result))
    return result


def run_staleness(_: argparse.Namespace) -> dict[str, Any]:
    """What answers without waiting cost in AUC; needs what `make demo` makes."""
    config = load(["--config", "configs/demo.yaml"], prog="bench.pda")
    result = staleness.staleness(config, say)
    say(staleness.table(result["staleness"]))
    return result


def run_table(args: argparse.Namespace) -> dict[str, Any]:
    """FLAME's Table 3: what the cache and the way to the device are worth; on a GPU with the model, else without."""
    config = load(["--config", "configs/climber_base.yaml"], prog="bench.pda")
    result = ablation.ablation(config, say, ablation.Size(seconds=args.seconds))
    say(ablation.table(result["table"]))
    return result


def run_transfers(_: argparse.Namespace) -> dict[str, Any]:
    """A batch to the device and scores back, beside JAX's plain way."""
    result = transfers.transfers(say)
    say(transfers.table(result["transfers"]))
    return result


MODES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "assembly": run_assembly,
    "faults": run_faults,
    "rows": run_host_rows,
    "staleness": run_staleness,
    "table": run_table,
    "transfers": run_transfers,
}


PLOTS: dict[str, Callable[[dict[str, Any]], str]] = {"table": ablation.plot}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write MODE.json, and a drawing where there is one."""
    parser = argparse.ArgumentParser(prog="python -m bench.pda", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    for name, mode in MODES.items():
        what.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=mode.__doc__)
    parser.add_argument("--out", metavar="DIR", help="takes the result as MODE.json")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="that each row of --table is measured (%(default)s)"
    )
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args = parser.parse_args(argv)
    about = describe(shlex.join(["python", "-m", "bench.pda", f"--{args.mode}", "--out", "DIR"]), args.commit)
    result = MODES[args.mode](args)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, f"{args.mode}.json").write_text(json.dumps(about | result, indent=1) + "\n")
        if args.mode in PLOTS:
            Path(args.out, f"{args.mode}.svg").write_text(PLOTS[args.mode](result))


if __name__ == "__main__":
    main()
