"""`python -m flame_jax.export plan --config FILE --trace FILE`: a bucket ladder for the traffic that there is.

Replays a trace of requests as the dispatcher would batch them, and proposes buckets that waste little on these
batches, beside the configured ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from flame_jax.commandline import load, refuse
from flame_jax.config import Config
from flame_jax.dso.replay import Level, arriving_within, replay, together
from flame_jax.fke.buckets import Ladder, make_ladder
from flame_jax.fke.device import kernels_for
from flame_jax.fke.footprint import Footprint, measure
from flame_jax.fke.ladder import Budget, Demand, choose_ladder, largest_for, smallest_largest
from flame_jax.models.checkpoint import CheckpointError, load_checkpoint
from flame_jax.models.cost import bucket_cost, filled_cost
from flame_jax.models.serving import served_slot
from flame_jax.packing import Bucket
from flame_jax.trace import Trace, TraceError, read_trace

PROG = "python -m flame_jax.export plan"

CONCURRENCY = (1, 4, 16)
VOCABULARY_ROWS = 100_000
GIB = 2**30


class PlanError(Exception):
    """No plan can be made; the message is one clear line."""


class Figures(NamedTuple):
    """What a ladder is expected to do.

    Attributes:
        shares: float64[buckets], of the batches.
        padded: FLOPs of a request.
        memory: bytes of slots on host and device, of code and of temporaries; None when nothing was measured.
        seconds: of building it, likewise.
    """

    ladder: Ladder
    shares: np.ndarray
    padded: float
    memory: float | None
    seconds: float | None


class Plan(NamedTuple):
    """The proposal beside the ladder of the configuration.

    Attributes:
        traffic: what was replayed, in words.
        useful: FLOPs of a request that no ladder can save.
    """

    traffic: str
    useful: float
    fixed: Figures
    proposed: Figures
    footprint: Footprint | None


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan."""
    args, settings = parse(list(sys.argv[1:] if argv is None else argv))
    config = load(settings, prog=PROG)
    try:
        plan = make_plan(args, config)
    except (PlanError, TraceError, CheckpointError, ValueError, OSError) as error:
        refuse(PROG, str(error), status=1)
    print(json.dumps(to_json(plan), indent=1) if args.json else to_text(plan))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own arguments, and those of the configuration; ends the process when they are wrong."""
    parser = _Parser(
        prog=PROG,
        allow_abbrev=False,
        description=__doc__.partition("\n")[2],
        epilog="--config FILE and flags --section.field set the configuration, as for every program; docs/ladder.md "
        "says how batches are made of a trace.",
    )
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="requests, .csv or .jsonl: history, candidates and maybe time")
    waits = parser.add_mutually_exclusive_group()
    waits.add_argument("--batch-ms", type=_positive, metavar="W", help="requests within W ms wait together")
    waits.add_argument(
        "--concurrency",
        type=_sizes,
        default=CONCURRENCY,
        metavar="N,...",
        help="so many requests in a row wait together, each number for as many requests (1,4,16)",
    )
    add("--max-buckets", type=_count, default=12, metavar="N", help="buckets of the proposal at most (12)")
    add("--memory-gib", type=_positive, metavar="G", help="GiB that the ladder takes beside the weights at most")
    add("--build-seconds", type=_positive, metavar="S", help="seconds that building the ladder takes at most")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--checkpoint", metavar="DIR", help="measure with the vocabulary of this checkpoint")
    rows.add_argument("--vocabulary-rows", type=_count, metavar="N", help="measure with N item rows (100000)")
    rows.add_argument("--no-measure", action="store_true", help="compile nothing: no figures of memory and build time")
    add("--json", action="store_true", help="print JSON")
    args, settings = parser.parse_known_args(argv)
    if args.no_measure and (args.memory_gib or args.build_seconds):
        parser.error("--no-measure measures neither --memory-gib nor --build-seconds: leave one or the other out")
    return args, settings


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part.strip()) for part in text.split(",")}))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def make_plan(args: argparse.Namespace, config: Config) -> Plan:
    """Replay the trace, measure, choose.

    Raises:
        PlanError, TraceError, CheckpointError, ValueError, OSError: one clear line.
    """
    model, schema, layout = config.model, config.schema, config.layout
    fixed = make_ladder(config.export.buckets, schema, layout)
    trace = read_trace(args.trace, max_candidates=config.server.max_candidates)
    levels, traffic = make_levels(args, trace)
    # Every block is taken to be as long as the events allow.
    rows = np.minimum(trace.history, schema.block_length) * (schema.history_rows // schema.block_length)
    useful = filled_cost(model, schema, rows, trace.candidates)
    demand = replay(rows, trace.candidates, levels, fixed[-1], layout)
    footprint = None if args.no_measure else take_measure(args, config, fixed, demand)
    planner = _Planner(config, footprint, args.memory_gib, args.build_seconds)
    beside = planner.figures(fixed, demand)

    largest = largest_for(demand, schema, layout)
    if (affordable := planner.affordable(largest)) != largest:
        largest, demand = affordable, replay(rows, trace.candidates, levels, affordable, layout)
    ladder = choose_ladder(
        demand,
        largest,
        planner.cost,
        max_buckets=args.max_buckets,
        budgets=planner.budgets(largest),
        start=fixed,
    )
    each = float(np.mean([useful[level.members].mean() for level in levels]))
    return Plan(traffic, each, beside, planner.figures(ladder, demand), footprint)


def make_levels(args: argparse.Namespace, trace: Trace) -> tuple[list[Level], str]:
    """Which requests wait together, and that in words. Raises PlanError for --batch-ms without times."""
    if args.batch_ms:
        if trace.time is None:
            raise PlanError(f"--batch-ms needs a column time, which trace {args.trace} lacks: use --concurrency")
        levels, how = [arriving_within(trace.time, args.batch_ms / 1000)], [f"that come within {args.batch_ms:g} ms"]
    else:
        levels = [together(len(trace.history), size) for size in args.concurrency]
        how = [f"in groups of {size}" for size in args.concurrency]
    replayed = ", ".join(f"{level.requests} {words}" for level, words in zip(levels, how, strict=True))
    return levels, f"{len(trace.history)} requests in {args.trace}; replayed: {replayed}"


def take_measure(args: argparse.Namespace, config: Config, fixed: Ladder, demand: Demand) -> Footprint:
    """Compile the smallest bucket there could be, the configured largest one, and one between.

    Raises:
        PlanError, CheckpointError: there is no device, it can't compile the model, or the checkpoint is not of it.
    """
    vocabulary = args.vocabulary_rows or VOCABULARY_ROWS
    if args.checkpoint is not None:
        checkpoint = load_checkpoint(args.checkpoint)
        checkpoint.check_fits(config.model, config.schema, args.checkpoint)
        vocabulary = checkpoint.vocabularies.items.rows
    device, largest = jax.devices()[0], fixed[-1]
    smallest = Bucket(
        min(int(demand.tokens.min()), *(bucket.tokens for bucket in fixed)),
        min(int(demand.candidates.min()), *(bucket.candidates for bucket in fixed)),
    )
    middle = (config.layout.aligned((few + many) // 2) for few, many in zip(smallest, largest, strict=True))
    try:
        return measure(
            config.model,
            config.schema,
            config.layout,
            [smallest, Bucket(*middle), largest],
            vocabulary,
            precision=config.export.matmul_precision,
            device=device,
            kernels=kernels_for(device, config.model, config.layout, config.export.kernels),
        )
    except RuntimeError as error:
        raise PlanError(f"buckets can't be compiled here (--no-measure plans without): {error}") from error


class _Planner:
    """Costs, budgets and figures of one configuration."""

    def __init__(
        self, config: Config, footprint: Footprint | None, memory_gib: float | None, build_seconds: float | None
    ) -> None:
        self._config, self._footprint = config, footprint
        self._memory = None if memory_gib is None else memory_gib * GIB
        self._seconds = build_seconds

    def cost(self, bucket: Bucket) -> int:
        """Padded FLOPs of a batch."""
        return bucket_cost(self._config.model, self._config.schema, self._config.layout, bucket)

    def budgets(self, largest: Bucket) -> list[Budget]:
        """What ladders with this largest bucket may take."""
        budgets = []
        if self._footprint and self._memory is not None:
            budgets.append(Budget(self._kept, self._memory - self._running(largest)))
        if self._footprint and self._seconds is not None:
            budgets.append(Budget(self._footprint.seconds.at, self._seconds))
        return budgets

    def affordable(self, largest: Bucket) -> Bucket:
        """`largest`, halved until it keeps every budget alone. Raises PlanError when no ladder can."""
        least, aligned = smallest_largest(self._config.schema, self._config.layout), self._config.layout.aligned
        while not all(budget.holds([largest]) for budget in self.budgets(largest)):
            if largest == least:
                memory, seconds = (self._memory_of((least,)) or 0) / GIB, self._seconds_of((least,)) or 0
                raise PlanError(
                    f"no ladder keeps --memory-gib and --build-seconds: {least}, the least that holds "
                    f"schema.block_length events, takes {memory:.3g} GiB and {seconds:.3g} s alone"
                )
            largest = Bucket(
                max(aligned(largest.tokens // 2), least.tokens), max(aligned(largest.candidates // 2), least.candidates)
            )
        return largest

    def figures(self, ladder: Ladder, demand: Demand) -> Figures:
        """What a ladder does on these batches."""
        spent = demand.spent(ladder, self.cost)
        return Figures(ladder, demand.shares(ladder), spent, self._memory_of(ladder), self._seconds_of(ladder))

    def _memory_of(self, ladder: Ladder) -> float | None:
        return sum(map(self._kept, ladder)) + self._running(ladder[-1]) if self._footprint else None

    def _seconds_of(self, ladder: Ladder) -> float | None:
        return sum(map(self._footprint.seconds.at, ladder)) if self._footprint else None

    def _kept(self, bucket: Bucket) -> float:
        """Bytes of a bucket while nothing runs: on each lane its executors' slots, on host and device, and its code."""
        assert self._footprint
        config = self._config
        slot = 4 * served_slot(config.model, config.schema, config.layout, bucket).words
        return config.dispatch.most_lanes * (2 * config.dispatch.executors * slot + self._footprint.code.at(bucket))

    def _running(self, largest: Bucket) -> float:
        """Bytes of temporaries when as many batches run as can, all in the largest bucket."""
        assert self._footprint
        dispatch = self._config.dispatch
        return dispatch.most_lanes * dispatch.executors * self._footprint.temporaries.at(largest)


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything that the text says."""

    def figures(of: Figures) -> dict[str, Any]:
        return {
            "buckets": [list(bucket) for bucket in of.ladder],
            "batch_shares": of.shares.tolist(),
            "useful_flops_per_request": plan.useful,
            "padded_flops_per_request": of.padded,
            "waste": of.padded / plan.useful - 1,
            "memory_bytes": of.memory,
            "build_seconds": of.seconds,
        }

    measured = plan.footprint
    return {
        "traffic": plan.traffic,
        "fixed": figures(plan.fixed),
        "proposed": figures(plan.proposed),
        "measured": measured
        and {
            "device_kind": measured.device_kind,
            "vocabulary_rows": measured.vocabulary,
            "buckets": [list(bucket) for bucket in measured.buckets],
            "temporary_bytes": measured.temporaries._asdict(),
            "code_bytes": measured.code._asdict(),
            "build_seconds": measured.seconds._asdict(),
        },
    }


def to_text(plan: Plan) -> str:
    """Both ladders side by side, and the lines to paste."""
    ladders = (plan.fixed, plan.proposed)
    rows = [
        ("", "configured", "proposed"),
        ("buckets", *(str(len(f.ladder)) for f in ladders)),
        ("useful GFLOP per request", *(f"{plan.useful / 1e9:.4g}" for _ in ladders)),
        ("padded GFLOP per request", *(f"{f.padded / 1e9:.4g}" for f in ladders)),
        ("waste", *(f"{100 * (f.padded / plan.useful - 1):.1f} %" for f in ladders)),
    ]
    if plan.footprint:
        rows.append(("memory, GiB", *(f"{(f.memory or 0) / GIB:.3g}" for f in ladders)))
        rows.append(("build time, s", *(f"{f.seconds or 0:.3g}" for f in ladders)))
    lines = [plan.traffic, _measured(plan.footprint), ""]
    lines += [f"{name:26}{left:>14}{right:>14}" for name, left, right in rows]
    for title, figures in zip(("configured", "proposed"), ladders, strict=True):
        lines += ["", f"{title} bucket".ljust(26) + "share of batches".rjust(18)]
        lines += [
            f"{list(bucket)!s:26}{100 * share:>16.1f} %"
            for bucket, share in zip(figures.ladder, figures.shares, strict=True)
        ]
    buckets = ", ".join(str(list(bucket)) for bucket in plan.proposed.ladder)
    return "\n".join([*lines, "", "export:", f"  buckets: [{buckets}]"])


def _measured(footprint: Footprint | None) -> str:
    if footprint is None:
        return "memory and build time were not measured"
    buckets = ", ".join(map(str, footprint.buckets))
    return (
        f"memory and build time: measured on this machine's {footprint.device_kind} by compiling {buckets} with "
        f"{footprint.vocabulary} item rows; other buckets by a line through these"
    )
