"""`python -m bench.fke [MODE] --out DIR`: the fused kernels on this GPU; whole forward passes unless told otherwise."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench.environment import describe
from bench.fke import ablation, attention, check, forward, mixed, profile, roofline, stack, tune
from bench.fke.choice import UnknownChoice
from flame_jax.pallas_kernels import tuned

Outcome = tuple[dict[str, Any], bool]
"""What goes to the result file, and whether something missed."""

say = partial(print, flush=True)


class Mode(NamedTuple):
    """One thing to do with the kernels; `takes` names the choices that it heeds."""

    help: str
    run: Callable[[argparse.Namespace], Outcome]
    takes: tuple[str, ...] = ()


def run_check(args: argparse.Namespace) -> Outcome:
    """Every check, told as it goes."""
    outcomes: list[tuple[str, bool]] = []

    def report(name: str, good: bool) -> None:
        say(f"{'ok  ' if good else 'MISS'} {name}")
        outcomes.append((name, good))

    check.check(report, args.only)
    missed = [name for name, good in outcomes if not good]
    say(f"{len(outcomes) - len(missed)} of {len(outcomes)} checks hold")
    return {"checks": len(outcomes), "missed": missed}, bool(missed)


def run_tune(args: argparse.Namespace) -> Outcome:
    """Time, and put what is fastest where exports find it; operations that are not timed keep what they have."""
    rows = tune.tune(say, args.only)
    path = Path(str(resources.files("flame_jax.pallas_kernels").joinpath("tuned", f"{tuned.DEVICE}.json")))
    kept = json.loads(path.read_text())["entries"] if args.only and path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"entries": kept | tune.entries(rows)}, indent=1) + "\n")
    return {"rows": [row._asdict() for row in rows], "entries": tune.entries(rows)}, False


def run_attention(args: argparse.Namespace) -> Outcome:
    """Attention alone."""
    result = attention.attention(args.only, say)
    say(attention.table(result["attention"]))
    return result, False


def run_mixed(args: argparse.Namespace) -> Outcome:
    """Requests of all lengths."""
    result = mixed.mixed(say)
    say(mixed.table(result))
    return result, False


def run_ablation(args: argparse.Namespace) -> Outcome:
    """The paper's table."""
    result = ablation.ablation(args.only, args.baselines, jax.devices()[0], say)
    say(ablation.table(result["ablation"]))
    return result, False


def run_forward(args: argparse.Namespace) -> Outcome:
    """Whole forward passes."""
    result = forward.forward(args.only, args.baselines, jax.devices()[0], say)
    say(forward.table(result["forward"]))
    return result, False


def run_stack(args: argparse.Namespace) -> Outcome:
    """HSTU's layers alone."""
    result = stack.stack(args.only, args.baselines, jax.devices()[0], say)
    say(stack.table(result["stack"]))
    return result, False


def run_profile(args: argparse.Namespace) -> Outcome:
    """Kernel by kernel."""
    result = profile.profile(args.only, jax.devices()[0])
    say(profile.table(result["profile"]))
    return result, False


CHOICES = ("only", "baselines")
MODES = {
    "check": Mode("are results right; exit 1 on any miss; --only takes operations", run_check, ("only",)),
    "tune": Mode(
        "time block sizes and write pallas_kernels/tuned/DEVICE.json; --only takes operations", run_tune, ("only",)
    ),
    "attention": Mode("attention alone, beside published figures and cuDNN", run_attention, ("only",)),
    "mixed": Mode("requests of all lengths in one batch, beside padding them", run_mixed),
    "ablation": Mode("the paper's table: eager PyTorch, plain jit, fused kernels", run_ablation, CHOICES),
    "forward": Mode("whole forward passes, beside the best plain JAX; the default", run_forward, CHOICES),
    "profile": Mode("what each kernel of a forward pass takes", run_profile, ("only",)),
    "stack": Mode("HSTU's layers alone, whole and with the history's K/V given", run_stack, CHOICES),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Exit 1 when a check misses, 2 when there is no such case."""
    args, parser = parse(argv)
    if args.plot:
        points = roofline.read(Path(args.plot))
        Path(args.plot, "roofline.svg").write_text(roofline.svg(points))
        return
    about = describe(shlex.join(["python", "-m", "bench.fke", *told(args)]), args.commit)
    try:
        results, missed = MODES[args.mode].run(args)
    except UnknownChoice as error:
        parser.error(str(error))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, f"{args.mode}.json").write_text(json.dumps(about | results, indent=1) + "\n")
    if missed:
        sys.exit(1)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fke", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    for name, mode in MODES.items():
        what.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=mode.help)
    what.add_argument("--plot", metavar="DIR", help="draw roofline.svg of the results in a folder; needs no GPU")
    parser.set_defaults(mode="forward")
    about = ("cases whose name holds one of these", "these baselines alone")
    for name, help in zip(CHOICES, about, strict=True):
        flag = parser.add_argument(f"--{name}", action="extend", metavar="NAME,...", default=[], help=help)
        flag.type = lambda text: text.split(",")
    parser.add_argument("--out", metavar="DIR", help="takes the results as MODE.json")
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args = parser.parse_args(argv)
    for name in CHOICES:
        if getattr(args, name) and (args.plot or name not in MODES[args.mode].takes):
            parser.error(f"--{'plot' if args.plot else args.mode} takes no --{name}")
    return args, parser


def told(args: argparse.Namespace) -> list[str]:
    """The arguments that say what was measured."""
    chosen = [(f"--{name}", ",".join(getattr(args, name))) for name in CHOICES]
    return [f"--{args.mode}", *(word for pair in chosen if pair[1] for word in pair), "--out", "DIR"]


if __name__ == "__main__":
    main()
