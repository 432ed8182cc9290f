"""Are executables that were built without a GPU as fast as those compiled on it?

`python -m bench.artifacts build --config FILE ... --work DIR` builds, on a machine without a GPU, an artifact of an
untrained model per configuration. `python -m bench.artifacts measure --work DIR --out DIR`, on the GPU, compiles the
same portable programs there and runs both executables of every bucket in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.environment import describe
from flame_jax.commandline import load
from flame_jax.config import Config
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.build import Builder, build, rebuild
from flame_jax.fke.engine import Engine
from flame_jax.fke.target import Target, described_device
from flame_jax.fke.tuning import Tuning
from flame_jax.fke.verify import verify
from flame_jax.models.checkpoint import Checkpoint
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import flat_weights
from flame_jax.packing import Bucket
from flame_jax.vocabulary import Vocabularies, Vocabulary

ITEMS = 2000
"""Of an untrained model: its table's size does not move the time of a batch."""
ROUNDS = 7
ROUND_SECONDS = 0.15


def main(argv: Sequence[str] | None = None) -> None:
    """Build or measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.artifacts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build")
    one.add_argument("--config", action="append", required=True, metavar="FILE")
    one.add_argument("--device-kind", default="h100")
    one.add_argument("--tuned", metavar="DIR", help="folder of MODEL.tuned.json, of `measure`")
    two = commands.add_parser("measure")
    two.add_argument("--out", required=True, metavar="DIR")
    two.add_argument("--commit", help="commit of this checkout, for the result file")
    for sub in (one, two):
        sub.add_argument("--work", required=True, metavar="DIR", help="folder of the artifacts")
    args = parser.parse_args(argv)
    if args.command == "build":
        for file in args.config:
            build_untrained(file, args)
    else:
        command = shlex.join(["python", "-m", "bench.artifacts", *(sys.argv[1:] if argv is None else argv)])
        out = Path(args.out)
        results = describe(command, args.commit) | {
            "models": {path.name: measure(path, out) for path in sorted(Path(args.work).iterdir()) if path.is_dir()}
        }
        (out / "artifacts.json").write_text(json.dumps(results, indent=1) + "\n")


def untrained(config: Config, items: int = ITEMS) -> Checkpoint:
    """A checkpoint of random weights."""
    vocabulary = Vocabulary(np.arange(items, dtype=np.int64))
    features = {
        name: Vocabulary(np.arange(min(f.size, items), dtype=np.int64)) for name, f in config.schema.id_features.items()
    }
    model = make_ranker(config.model, config.schema, vocabulary.rows, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    # Initial weights score every item alike: move them, so that scores tell a wrong kernel.
    weights = {
        name: (w + 0.02 * random.normal(size=w.shape)).astype(w.dtype) for name, w in flat_weights(model).items()
    }
    return Checkpoint(0, config.model, config.schema, Vocabularies(vocabulary, features), weights, [])


def build_untrained(file: str, args: argparse.Namespace) -> None:
    """Cross-build one configuration's artifact."""
    config = load(["--config", file], prog="bench.artifacts")
    device = described_device(args.device_kind)
    tuned = Path(args.tuned) / f"{config.model.name}.tuned.json" if args.tuned else None
    tuning = Tuning.load(tuned, Target.of(device)) if tuned is not None else None
    path = str(Path(args.work) / config.model.name)
    config = replace(config, export=replace(config.export, artifact=path))
    build(config, untrained(config), Builder(device, tuning=tuning))


def measure(path: Path, out: Path) -> dict[str, Any]:
    """One artifact against the same programs compiled here: milliseconds a batch, side by side."""
    artifact, device = Artifact(path), jax.devices()[0]
    programs = [artifact.read(f"{bucket}.stablehlo") for bucket in artifact.manifest.buckets]
    tuning = Tuning.measure(programs, device)
    tuning.save(out / f"{path.name}.tuned.json")
    here = path.with_name(f".{path.name}.here")
    built = rebuild(artifact, here, Builder(device, tuning=tuning, progress=False))
    crossed, native = Engine(artifact, device), Engine(Artifact(here), device)
    crossed.warm()
    native.warm()
    rows = {}
    for e, compiled in zip(artifact.manifest.executables, built.executables, strict=True):
        times = side_by_side([runner(crossed, e.bucket, device), runner(native, e.bucket, device)])
        rows[str(e.bucket)] = {
            "cross_ms": times[0],
            "here_ms": times[1],
            "ratio": times[0] / times[1],
            "cross_tuning": e.tuning,
            "here_tuning": compiled.tuning,
            "cross_compile_s": e.compile_seconds,
            "here_compile_s": compiled.compile_seconds,
        }
    return {
        "buckets": rows,
        "golden_difference": {"cross": crossed.golden_difference, "here": native.golden_difference},
        "verify": [report.to_json() for report in verify(artifact, device)],
    }


def runner(engine: Engine, bucket: Bucket, device: jax.Device) -> Callable[[], jax.Array]:
    """Launches one batch whose slot already lies on the device."""
    words = jax.device_put(np.zeros(engine.slots[bucket].words, np.int32), device)
    return lambda: engine.launch(bucket, words)


def side_by_side(runs: Sequence[Callable[[], jax.Array]]) -> list[float]:
    """Median over rounds of milliseconds a call, pipelined; the runs take turns within a round."""
    counts = [max(5, int(ROUND_SECONDS * 1e3 / max(_milliseconds(run, 5), 1e-3))) for run in runs]
    rounds = [[_milliseconds(run, n) for run, n in zip(runs, counts, strict=True)] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _milliseconds(run: Callable[[], jax.Array], count: int) -> float:
    run().block_until_ready()
    started = time.perf_counter()
    for _ in range(count):
        last = run()
    last.block_until_ready()
    return (time.perf_counter() - started) * 1e3 / count


if __name__ == "__main__":
    main()
