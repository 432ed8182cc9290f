"""`python -m bench.fke [--check | --tune] --out DIR`: the fused kernels on this GPU, timed unless told otherwise."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jax

from bench.environment import describe
from bench.fke import check, forward, tune
from flame_jax.pallas_kernels import tuned


def main(argv: Sequence[str] | None = None) -> None:
    """Exit 1 when a check misses."""
    parser = argparse.ArgumentParser(prog="python -m bench.fke", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="are results right; exit 1 on any miss")
    what.add_argument("--tune", action="store_true", help="time block sizes and write pallas_kernels/tuned/DEVICE.json")
    parser.add_argument("--only", action="append", metavar="CONFIG", help="time this configuration; may be repeated")
    parser.add_argument("--out", metavar="DIR", help="takes the results as JSON")
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args = parser.parse_args(argv)
    mode = "check" if args.check else "tune" if args.tune else "forward"
    flags = [] if mode == "forward" else [f"--{mode}"]
    about = describe(shlex.join(["python", "-m", "bench.fke", *flags, "--out", "DIR"]), args.commit)
    results, missed = run_check() if args.check else run_tune() if args.tune else run_forward(args.only)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, f"{mode}.json").write_text(json.dumps(about | results, indent=1) + "\n")
    if missed:
        sys.exit(1)


def run_check() -> tuple[dict[str, object], bool]:
    """Every check, told as it goes."""
    outcomes: list[tuple[str, bool]] = []

    def report(name: str, good: bool) -> None:
        print("ok  " if good else "MISS", name, flush=True)
        outcomes.append((name, good))

    check.check(report)
    missed = [name for name, good in outcomes if not good]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} checks hold")
    return {"checks": len(outcomes), "missed": missed}, bool(missed)


def run_tune() -> tuple[dict[str, object], bool]:
    """Time, and put what is fastest where exports find it."""
    rows = tune.tune(lambda line: print(line, flush=True))
    file = resources.files("flame_jax.pallas_kernels").joinpath("tuned", f"{tuned.DEVICE}.json")
    path = Path(str(file))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"entries": tune.entries(rows)}, indent=1) + "\n")
    return {"rows": [row._asdict() for row in rows], "entries": tune.entries(rows)}, False


def run_forward(only: list[str] | None) -> tuple[dict[str, object], bool]:
    """The table of whole forward passes."""
    cases = [case for case in forward.CASES if not only or case.config in only]
    results = [forward.forward(case, jax.devices()[0], lambda line: print(line, flush=True)) for case in cases]
    print(forward.table(results))
    return {"forward": results}, False


if __name__ == "__main__":
    main()
