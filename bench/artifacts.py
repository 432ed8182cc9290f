"""Are executables that were built without a GPU as fast as those compiled on it?

`python -m bench.artifacts build --config FILE ... --work DIR` builds, on a machine without a GPU, an artifact of an
untrained model per configuration. `python -m bench.artifacts measure --work DIR --out DIR`, on the GPU, compiles the
same portable programs there, tunes, builds once more without the GPU but with the tuning, and runs the three
executables of every bucket in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.environment import describe
from bench.timing import Launch, side_by_side
from flame_jax.commandline import load
from flame_jax.config import Config
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.build import Builder, build, rebuild
from flame_jax.fke.device import described_device, described_devices
from flame_jax.fke.engine import Engine
from flame_jax.fke.golden import whole
from flame_jax.fke.manifest import portable_name
from flame_jax.fke.tuning import Tuning
from flame_jax.fke.verify import verify
from flame_jax.models.checkpoint import Checkpoint
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import flat_weights
from flame_jax.packing import Bucket
from flame_jax.vocabulary import Vocabularies, Vocabulary

ITEMS = 2000
"""Of an untrained model: its table's size does not move the time of a batch."""


def main(argv: Sequence[str] | None = None) -> None:
    """Build or measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.artifacts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build")
    one.add_argument("--config", action="append", required=True, metavar="FILE")
    one.add_argument("--device-kind", default="h100")
    two = commands.add_parser("measure")
    two.add_argument("--out", required=True, metavar="DIR")
    two.add_argument("--scratch", default="runs/cross_scratch", metavar="DIR", help="takes what is built here")
    two.add_argument("--commit", help="commit of this checkout, for the result file")
    for sub in (one, two):
        sub.add_argument("--work", required=True, metavar="DIR", help="folder of the artifacts")
    args, settings = parser.parse_known_args(argv)
    if args.command == "build":
        for file in args.config:
            build_untrained(file, settings, args)
    else:
        command = shlex.join(["python", "-m", "bench.artifacts", *(sys.argv[1:] if argv is None else argv)])
        results = describe(command, args.commit) | {"models": {}}
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(args.work).iterdir()):
            results["models"][path.name] = measure(path, Path(args.scratch))
            Path(args.out, "artifacts.json").write_text(json.dumps(results, indent=1) + "\n")


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


def build_untrained(file: str, settings: list[str], args: argparse.Namespace) -> None:
    """Cross-build one configuration's artifact, with other settings as flags."""
    config = load(["--config", file, *settings], prog="bench.artifacts")
    device = described_device(args.device_kind)
    path = str(Path(args.work) / config.model.name)
    config = replace(config, export=replace(config.export, artifact=path))
    build(config, untrained(config), Builder(device))


def measure(path: Path, scratch: Path) -> dict[str, Any]:
    """One artifact against the same programs compiled here: milliseconds a batch, side by side."""
    scratch.mkdir(parents=True, exist_ok=True)
    guessed, device = Artifact(path), jax.devices()[0]
    here, tuned, file = (scratch / f"{path.name}.{n}" for n in ("here", "tuned", "tuned.json"))
    started = time.perf_counter()
    rebuild(guessed, here, Builder(device, progress=False))
    here_seconds = time.perf_counter() - started
    # In the process that compiled them, so that nothing is measured twice.
    Tuning.measure([guessed.read(portable_name(bucket)) for bucket in guessed.manifest.buckets], device).save(file)
    started = time.perf_counter()
    cross_build(path, guessed.manifest.target.device_kind, file, tuned)
    tuned_seconds = time.perf_counter() - started
    engines = {name: Engine(Artifact(p), device) for name, p in (("guessed", path), ("tuned", tuned), ("here", here))}
    for engine in engines.values():
        engine.warm()
    rows = {}
    for bucket in guessed.manifest.buckets:
        milliseconds = side_by_side({name: runner(engine, bucket, device) for name, engine in engines.items()})
        rows[str(bucket)] = {
            "ms": milliseconds,
            "tuned_to_here": milliseconds["tuned"] / milliseconds["here"],
            "guessed_to_here": milliseconds["guessed"] / milliseconds["here"],
            "tuning": {name: tuning_of(engine, bucket) for name, engine in engines.items()},
            "same_bits": same_bits(engines["tuned"], engines["here"], bucket),
        }
    return {
        "buckets": rows,
        "seconds": {"compile_here": here_seconds, "cross_build_tuned": tuned_seconds},
        "golden_difference": {name: engine.golden_difference for name, engine in engines.items()},
        "verify": [report.to_json() for report in verify(Artifact(tuned), device)],
    }


def tuning_of(engine: Engine, bucket: Bucket) -> str:
    """How the bucket's kernels were chosen."""
    return next(e.tuning for e in engine.manifest.executables if e.bucket == bucket)


def cross_build(path: Path, kind: str, tuning: Path, out: Path) -> None:
    """Build in a process that does not see the GPU."""
    described = next(name for name in described_devices() if name in kind.lower())
    command = [sys.executable, "-m", "flame_jax.export", "build", "--from", str(path), "--device-kind", described]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--tuned", str(tuning), "--out", str(out)], check=True, env=environment)


def same_bits(one: Engine, other: Engine, bucket: Bucket) -> bool:
    """Whether two executables score golden requests alike."""
    pieces = [whole(one.golden.records[i], one.packer.records) for i in one.packer.batches(one.golden, bucket)[0]]
    words, rows = one.packer.pack(pieces, bucket)
    first, second = one.run(bucket, words), other.run(bucket, words)
    return all(first[r].tobytes() == second[r].tobytes() for r in rows)


def runner(engine: Engine, bucket: Bucket, device: jax.Device) -> Launch:
    """Launches one batch whose slot already lies on the device."""
    words = jax.device_put(np.zeros(engine.slots[bucket].words, np.int32), device)
    return lambda: engine.launch(bucket, words)


if __name__ == "__main__":
    main()
