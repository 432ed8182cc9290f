"""`python -m bench.parity --config FILE --out DIR [--reference FILE]`: do two devices rank alike?

Serves the configured artifact on this machine's first device, ranks users over gRPC, and writes their scores
(`scores.safetensors`). With a reference made elsewhere it compares: the largest difference of a probability, and the
largest gap, in the reference's scores, between two items that changed order.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bench.environment import describe
from flame_jax.client import RankingClient
from flame_jax.commandline import load
from flame_jax.demo import wait_ready
from flame_jax.pda.lmdb_store import LmdbStore

TOLERANCE = 1e-4
REPEATS = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Exit 1 when order differs where scores differ by more than the tolerance."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--reference", metavar="FILE", help="scores.safetensors of another device")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args, flags = parser.parse_known_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = ["--config", args.config, *flags]
    config = load(settings, prog="bench.parity")
    scores, latency = rank_users(settings, LmdbStore(config.store.path), args.users)
    safetensors.numpy.save_file(scores, out / "scores.safetensors")
    reference = ["--reference", "SCORES"] if args.reference else []
    command = shlex.join(["python", "-m", "bench.parity", "--config", args.config, "--out", "DIR", *reference, *flags])
    result: dict[str, Any] = {
        **describe(command, args.commit),
        "matmul_precision": config.export.matmul_precision,
        "users": len(scores),
        "pairs": int(sum(map(len, scores.values()))),
        "latency_ms": latency,
    }
    if args.reference:
        theirs = safetensors.numpy.load_file(args.reference)
        result["against_reference"] = compare({user: theirs[user] for user in scores}, scores)
    (out / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if args.reference and result["against_reference"]["largest_gap_out_of_order"] >= TOLERANCE:
        sys.exit(1)


def rank_users(settings: list[str], store: LmdbStore, users: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores per user over every item of the store, as of the user's last event, and client-side latency."""
    command = [sys.executable, "-m", "flame_jax.server", *settings, "--server.port", "0", "--server.metrics_port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        items = store.item_ids()
        scores: dict[str, np.ndarray] = {}
        times = []
        with RankingClient(wait_ready(server)) as client:
            for user in list(store.users())[:users]:
                record = store.read(user, items[:0]).user
                assert record is not None
                at = int(record.history.timestamps[-1])
                answer = client.rank(user, items, request_time=at)
                scores[user] = next(iter(answer.scores.values()))
                times.append(answer.latency_ms)
            one = next(iter(scores))
            small = [client.rank(one, items[:128], request_time=2**30).latency_ms for _ in range(REPEATS)]
    finally:
        server.terminate()
        server.wait()
    return scores, {
        "all_items_p50": float(np.median(times)),
        "all_items_p99": float(np.quantile(times, 0.99)),
        "128_candidates_p50": float(np.median(small)),
    }


def compare(reference: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> dict[str, float]:
    """How far two devices are apart.

    `largest_gap_out_of_order` is the largest difference, in the reference's scores, between two items that
    the other device ranks the other way round.
    """
    worst, gap, swapped = 0.0, 0.0, 0
    for user, theirs in reference.items():
        worst = max(worst, float(np.abs(theirs - scores[user]).max()))
        ordered = theirs[np.argsort(-scores[user], kind="stable")]
        rises = ordered - np.minimum.accumulate(ordered)
        gap = max(gap, float(rises.max()))
        swapped += int((rises > 0).any())
    return {
        "largest_score_difference": worst,
        "largest_gap_out_of_order": gap,
        "users_with_another_order": swapped,
    }


if __name__ == "__main__":
    main()
