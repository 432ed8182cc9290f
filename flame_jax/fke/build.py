"""From weights to an artifact: portable programs, executables, golden scores."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jaxlib import _jax
from tqdm import tqdm

from flame_jax import __version__
from flame_jax.config import Config
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.buckets import make_ladder
from flame_jax.fke.compile import compiled_anew, lower_program, platforms, portable_program, serialize
from flame_jax.fke.device import kernels_for, target_of
from flame_jax.fke.engine import Engine
from flame_jax.fke.golden import Golden, Packer, golden_records, reference_bucket, score_each
from flame_jax.fke.manifest import (
    GOLDEN,
    ITEM_TABLE,
    WEIGHTS,
    BuiltExecutable,
    Choices,
    Manifest,
    executable_name,
    golden_tolerance,
    portable_name,
    vocabulary_name,
)
from flame_jax.fke.signing import SigningKey
from flame_jax.fke.tuning import Tuning, compile_tuned, results_file
from flame_jax.fke.writer import check_place, write_artifact
from flame_jax.host_table import host_table
from flame_jax.models.checkpoint import Checkpoint
from flame_jax.models.cost import bucket_cost
from flame_jax.models.kernel_choice import HOPPER, in_use
from flame_jax.models.serving import (
    abstract_model,
    check_weights,
    host_item_table,
    served_specs,
    served_weights,
    weight_specs,
)
from flame_jax.packing import Bucket
from flame_jax.record import RecordLayout
from flame_jax.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True)
class Builder:
    """What executables are compiled for, and how.

    Attributes:
        device: one of this machine, or a described one.
        jobs: buckets compiled at once; 0: as many as there are cores, or one where XLA measures kernels meanwhile.
        tuning: choices of kernels measured before.
        key: signs the artifact.
        progress: show bars on stderr, where it is a terminal.
    """

    device: jax.Device
    jobs: int = 0
    tuning: Tuning | None = None
    key: SigningKey | None = None
    progress: bool = True

    @property
    def present(self) -> bool:
        """Whether the device is in this machine."""
        return not isinstance(self.device.client, _jax.CompileOnlyPyClient)

    def compile(self, programs: Mapping[Bucket, bytes]) -> dict[Bucket, Built]:
        """Compile portable programs.

        Lowering is Python and goes one by one; XLA's compilation leaves the interpreter, so it goes in threads.
        """
        target = target_of(self.device)
        measures = target.platform == "cuda" and self.present and self.tuning is None
        jobs = self.jobs or (1 if measures else os.cpu_count() or 1)
        built: dict[Bucket, Built] = {}
        with tempfile.TemporaryDirectory() as folder, compiled_anew():
            file = results_file(self.tuning, Path(folder))

            def work(lowered: jax.stages.Lowered) -> Built:
                started = time.perf_counter()
                compiled, tuning = compile_tuned(lowered, target, present=self.present, file=file)
                seconds = time.perf_counter() - started
                return Built(serialize(compiled), seconds, _temp_bytes(compiled), tuning)

            pool = ThreadPoolExecutor(jobs)
            try:
                # The costliest first, so that the last to finish is a small one.
                waiting = {
                    bucket: pool.submit(work, lower_program(programs[bucket], self.device))
                    for bucket in sorted(programs, reverse=True)
                }
                with tqdm(total=len(waiting), desc="compile", unit="bucket", disable=not self.progress or None) as bar:
                    for bucket, future in waiting.items():
                        built[bucket] = future.result()
                        bar.set_postfix_str(f"{bucket} {built[bucket].seconds:.1f} s")
                        bar.update()
            finally:
                # When one has failed, or on Ctrl-C, those that have not begun do not begin.
                pool.shutdown(cancel_futures=True)
        return built


class Built(NamedTuple):
    """One bucket, compiled: the executable's bytes, and what `BuiltExecutable` says of it."""

    payload: bytes
    seconds: float
    temp_bytes: int
    tuning: Choices


def build(config: Config, checkpoint: Checkpoint, builder: Builder) -> Manifest:
    """Build an artifact of a checkpoint at `config.export.artifact`.

    Raises:
        ValueError: the ladder or the weights don't fit the model, or its scores are no numbers.
        ArtifactError: something that is no artifact is at that place, or the executables don't score as they must.
        OSError: it can't be written.
    """
    path = check_place(Path(config.export.artifact))
    model, schema = checkpoint.model, checkpoint.schema
    ladder = make_ladder(config.export.buckets, schema, config.layout)
    rows = checkpoint.vocabularies.items.rows
    check_weights(weight_specs(abstract_model(model, schema, rows)), checkpoint.weights)
    kernels = kernels_for(builder.device, model, config.layout, config.export.kernels)
    weights = served_weights(model, checkpoint.weights)
    item_table = host_item_table(model, checkpoint.weights)
    programs = {
        bucket: portable_program(
            model, schema, config.layout, bucket, rows, precision=config.export.matmul_precision, kernels=kernels
        )
        for bucket in tqdm(ladder, desc="trace", unit="bucket", disable=not builder.progress or None)
    }
    packer = Packer(model, schema, config.layout, RecordLayout(schema, host_table(item_table)))
    records = golden_records(schema, checkpoint.vocabularies, config.layout, ladder)
    golden = Golden(records, _reference_scores(packer, records, weights, rows, config.export.matmul_precision))
    golden.check()
    files: dict[str, bytes | np.ndarray] = {
        WEIGHTS: tensor_bytes(weights),
        GOLDEN: tensor_bytes(golden.tensors()),
        vocabulary_name(): vocabulary_bytes(checkpoint.vocabularies.items),
    }
    files |= {vocabulary_name(name): vocabulary_bytes(v) for name, v in checkpoint.vocabularies.features.items()}
    if item_table is not None:
        files[ITEM_TABLE] = item_table
    manifest = Manifest(
        version=config.export.version,
        created="",
        versions={},
        model=model,
        schema=schema,
        layout=config.layout,
        target=target_of(builder.device),
        platforms=platforms(kernels),
        matmul_precision=config.export.matmul_precision,
        kernels=in_use(model, kernels),
        executables=(),
        golden_tolerance=golden_tolerance(model, config.export.matmul_precision),
    )
    return _finish(path, manifest, files, programs, builder)


def rebuild(artifact: Artifact, path: Path, builder: Builder) -> Manifest:
    """Compile another artifact's portable programs for another target; all else is taken over, and checked first.

    Raises:
        ArtifactError: the artifact is damaged, or something that is no artifact is at `path`.
        ValueError: its programs can't be compiled for the builder's device.
        OSError: it can't be written.
    """
    path, manifest = check_place(path), artifact.manifest
    target, fused = target_of(builder.device), "mosaic" in manifest.kernels.values()
    if fused and target.compute_capability != HOPPER:
        raise ValueError(
            f"artifact {artifact.path} holds fused kernels for compute capability {HOPPER}: build from the checkpoint, "
            f"or with --export.kernels xla, for {target.device_kind}"
        )
    if not fused and "mosaic" in kernels_for(builder.device, manifest.model, manifest.layout):
        log.warning(
            "artifact %s holds no fused kernels, and its programs are compiled as they are: built from the checkpoint "
            "with export.kernels=auto for %s, the model would have them",
            artifact.path,
            target.device_kind,
        )
    return _finish(path, manifest, artifact.data(), artifact.programs(), builder)


def _finish(
    path: Path,
    manifest: Manifest,
    files: Mapping[str, bytes | np.ndarray],
    programs: Mapping[Bucket, bytes],
    builder: Builder,
) -> Manifest:
    built = builder.compile(programs)
    flops = {b: bucket_cost(manifest.model, manifest.schema, manifest.layout, b) for b in built}
    manifest = replace(
        manifest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"flame-jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        target=target_of(builder.device),
        executables=tuple(
            BuiltExecutable(bucket, flops[bucket], one.temp_bytes, round(one.seconds, 3), one.tuning)
            for bucket, one in sorted(built.items())
        ),
    )
    made = {portable_name(bucket): program for bucket, program in programs.items()}
    made |= {executable_name(bucket): one.payload for bucket, one in built.items()}

    def check(folder: Path) -> None:
        if builder.present:
            Engine(Artifact(folder), builder.device).warm()

    return write_artifact(path, manifest, {**files, **made}, key=builder.key, check=check)


def _reference_scores(
    packer: Packer, records: list[np.ndarray], weights: Mapping[str, np.ndarray], rows: int, precision: str
) -> list[np.ndarray]:
    """Scores of the golden requests by the model compiled for this machine's CPU."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError("golden scores are made on the CPU: let JAX_PLATFORMS name it too (cuda,cpu)") from error
    bucket = reference_bucket(packer.schema, packer.layout)
    program = portable_program(packer.model, packer.schema, packer.layout, bucket, rows, precision=precision)
    compiled = lower_program(program, cpu).compile()
    order = served_specs(packer.model, packer.schema, rows)
    arrays = [jax.device_put(weights[name], cpu) for name in order]
    return score_each(packer, records, bucket, lambda words: compiled(arrays, jax.device_put(words, cpu)))


def _temp_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def tensor_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file."""
    return bytes(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))


def vocabulary_bytes(vocabulary: Vocabulary) -> bytes:
    """A .npy file."""
    file = BytesIO()
    vocabulary.save(file)
    return file.getvalue()
