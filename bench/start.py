"""`python -m bench.start --artifact DIR --out FILE`: from the start of the server's process to READY.

Beside it, in a process of its own, the time to compile the same programs on this machine, which is what a server
without executables would do first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.environment import describe
from bench.serving import scrape, serving
from bench.synthetic import write_store
from flame_jax.client import RankingClient
from flame_jax.fke.artifact import Artifact


def main(argv: Sequence[str] | None = None) -> None:
    """Exit 1 when something compiles after READY."""
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    parser.add_argument("--artifact", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--starts", type=int, default=4, help="the first is left out: it fills the page cache")
    parser.add_argument("--commit", help="commit of this checkout, for the result file")
    args = parser.parse_args(argv)
    command = ["python", "-m", "bench.start", "--artifact", "DIR", "--out", "FILE", "--starts", str(args.starts)]
    artifact = Artifact(args.artifact)
    manifest, items = artifact.manifest, artifact.vocabularies().items.keys
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", manifest.schema, items, 20, 2000)
        starts = [start(args.artifact, Path(folder) / "store", items[:100].tolist()) for _ in range(args.starts)]
        built = compile_here(args.artifact, Path(folder) / "built")
    warm = starts[1:]
    ready = statistics.median(s["ready_seconds"] for s in warm)
    result = describe(shlex.join(command), args.commit) | {
        "model": manifest.model.name,
        "buckets": [str(bucket) for bucket in manifest.buckets],
        "artifact_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "ready_seconds": ready,
        "load_seconds": statistics.median(s["load_seconds"] for s in warm),
        "compile_here_seconds": built,
        "ratio": built / ready,
        "starts": starts,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if any(s["compiles_after_ready"] for s in starts):
        sys.exit(1)


def start(artifact: str, store: Path, items: list[int]) -> dict[str, Any]:
    """Start a server, rank once, stop it."""
    flags = ["--export.artifact", artifact, "--store.path", str(store), "--server.log_level", "WARNING"]
    began = time.perf_counter()
    with serving(flags) as about:
        ready = time.perf_counter() - began
        with RankingClient(about["grpc"]) as client:
            client.rank("u1", items, timeout=10)
            first = time.perf_counter() - began
        metrics = scrape(about)
    return {
        "ready_seconds": ready,
        "first_answer_seconds": first,
        "load_seconds": metrics["flame_model_load_seconds_sum"],
        "compiles_after_ready": int(metrics["flame_compiles_after_ready_total"]),
    }


def compile_here(artifact: str, out: Path) -> float:
    """Seconds that compiling the artifact's portable programs takes on this machine, in a new process."""
    command = [sys.executable, "-m", "flame_jax.export", "build", "--from", artifact, "--out", str(out)]
    began = time.perf_counter()
    # Without a cache on disk, which would keep what an earlier run compiled.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
