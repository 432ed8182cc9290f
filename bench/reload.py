"""`python -m bench.reload --config FILE --out FILE`: what a reload costs the calls around it.

Serves two copies of the configured artifact as versions of one model, under calls at a fixed rate. After `--seconds`
of the first one alone, the second appears in the middle of as many seconds again. Latency counts from when a call was
due, so that a stall is seen by every call that it holds up.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from bench.environment import describe
from bench.serving import scrape, serving
from flame_jax.client import RankingClient
from flame_jax.commandline import load
from flame_jax.fke.manifest import MANIFEST
from flame_jax.pda.lmdb_store import LmdbStore

THREADS = 16
VERSIONS = ("1", "2")
WARM_UP_SECONDS = 5.0


class Call(NamedTuple):
    """One call: when it was due and how long after that it was answered, in seconds; the version, or the fault."""

    due: float
    latency: float
    version: str


def main(argv: Sequence[str] | None = None) -> None:
    """Exit 1 when a call fails or something compiles."""
    parser = argparse.ArgumentParser(prog="python -m bench.reload", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--rate", type=float, default=50.0, help="calls per second (default %(default)s)")
    parser.add_argument("--candidates", type=int, default=128, help="of a call (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="before, and around (default %(default)s)")
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args, flags = parser.parse_known_args(argv)
    config = load(["--config", args.config, *flags], prog="bench.reload")
    given = [f"--{name}={getattr(args, name):g}" for name in ("rate", "candidates", "seconds")]
    command = shlex.join(["python", "-m", "bench.reload", "--config", args.config, "--out", "FILE", *given, *flags])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(config.export.artifact, root / "first")
        name = json.loads((root / "first" / MANIFEST).read_text())["model"]["name"]
        (root / "models" / name).mkdir(parents=True)
        publish(root / "first", root / "models" / name / "1")
        settings = ["--config", args.config, *flags, "--server.models_dir", str(root / "models")]
        store = LmdbStore(config.store.path)
        load_of = Load(args.rate, args.seconds, list(store.users())[:500], store.item_ids()[: args.candidates])
        measured = measure(settings, load_of, lambda: publish(root / "first", root / "models" / name / "2"))
    result = describe(command, args.commit) | measured
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["failed_calls"] or result["compiles_after_ready"]:
        sys.exit(1)


def publish(artifact: Path, folder: Path) -> None:
    """Copy an artifact to where its folder's name is its version; it appears whole."""
    partial = folder.with_name(f".{folder.name}")
    shutil.copytree(artifact, partial)
    manifest = json.loads((partial / MANIFEST).read_text())
    (partial / MANIFEST).write_text(json.dumps(manifest | {"version": folder.name}))
    partial.rename(folder)


class Load(NamedTuple):
    """Calls per second, length of either period, and what is ranked for whom."""

    rate: float
    seconds: float
    users: list[str]
    items: np.ndarray


def measure(settings: list[str], load: Load, reload: Callable[[], None]) -> dict[str, Any]:
    """Drive a server before and around a reload."""
    with serving(settings) as about:
        begin, calls = time.monotonic() + WARM_UP_SECONDS, list[Call]()
        threads = [threading.Thread(target=drive, args=(about["grpc"], load, n, begin, calls)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        time.sleep(begin + 1.5 * load.seconds - time.monotonic())
        published = time.monotonic()
        reload()
        for thread in threads:
            thread.join()
        metrics = scrape(about)
    switched = min((call.due for call in calls if call.version == VERSIONS[1]), default=begin + 2 * load.seconds)
    loading = [call.latency * 1e3 for call in calls if published <= call.due < switched]
    return summary(calls, begin, load.seconds) | {
        "while_loading": {
            "seconds": switched - published,
            "ms": {f"p{q}": float(np.percentile(loading, q)) for q in (50, 75, 90, 100)},
        },
        "load_seconds": metrics["flame_model_load_seconds_sum"] / 2,
        "compiles_after_ready": int(metrics["flame_compiles_after_ready_total"]),
    }


def summary(calls: list[Call], begin: float, seconds: float) -> dict[str, Any]:
    """What the two periods have in numbers, before and around; calls before `begin` warmed up."""
    before = [call for call in calls if begin <= call.due < begin + seconds]
    around = [call for call in calls if begin + seconds <= call.due]
    p50, p99, longest = (
        [float(np.quantile([call.latency for call in part], share) * 1e3) for part in (before, around)]
        for share in (0.5, 0.99, 1.0)
    )
    return {
        "calls": [len(before), len(around)],
        "failed_calls": sum(call.version not in VERSIONS for call in calls),
        "calls_by_version": {version: sum(call.version == version for call in around) for version in VERSIONS},
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_ratio": p99[1] / p99[0],
        "longest_ms": longest,
    }


def drive(target: str, load: Load, thread: int, begin: float, calls: list[Call]) -> None:
    """One thread's calls, due `THREADS / rate` apart, until both periods are over."""
    due = begin - WARM_UP_SECONDS + thread / load.rate
    with RankingClient(target) as client:
        for number in count(thread):
            if due >= begin + 2 * load.seconds:
                return
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                version = client.rank(load.users[number % len(load.users)], load.items, timeout=10).version
            except grpc.RpcError as error:
                version = error.code().name
            calls.append(Call(due, time.monotonic() - due, version))
            due += THREADS / load.rate


if __name__ == "__main__":
    main()
