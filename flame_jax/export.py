"""`python -m flame_jax.export --config FILE`: checkpoint to artifact, one executable per bucket."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from tqdm import tqdm

from flame_jax.commandline import load, refuse
from flame_jax.config import Config
from flame_jax.fke.artifact import ArtifactError, Manifest, Target, jaxlib_version, write_artifact
from flame_jax.fke.buckets import make_ladder
from flame_jax.fke.compile import compile_bucket, platform_of, serialize
from flame_jax.models.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from flame_jax.models.serving import abstract_model, check_weights, host_item_table, served_weights, weight_specs
from flame_jax.packing import Bucket

PROG = "python -m flame_jax.export"


def main(argv: Sequence[str] | None = None) -> None:
    """Build an artifact for this machine's first device."""
    config = load(argv, prog=PROG)
    try:
        checkpoint = load_checkpoint(config.train.checkpoint)
        checkpoint.check_fits(config.model, config.schema, config.train.checkpoint)
        checkpoint = replace(checkpoint, model=config.model)
        manifest = export(config, checkpoint, jax.devices()[0])
    except (ArtifactError, CheckpointError, ValueError, OSError) as error:
        refuse(PROG, str(error), status=1)
    print(
        f"wrote {config.export.artifact}: model {manifest.model.name} version {manifest.version}, "
        f"{len(manifest.buckets)} buckets for {manifest.target.platform} ({manifest.target.device_kind})"
    )


def export(config: Config, checkpoint: Checkpoint, device: jax.Device, *, progress: bool = True) -> Manifest:
    """Compile every bucket for `device` and write the artifact.

    Raises:
        ValueError: the ladder or the weights don't fit the model.
    """
    ladder = make_ladder(config.export.buckets, checkpoint.schema, config.layout)
    rows = checkpoint.vocabularies.items.rows
    check_weights(weight_specs(abstract_model(checkpoint.model, checkpoint.schema, rows)), checkpoint.weights)
    executables: dict[Bucket, bytes] = {}
    for bucket in (bar := tqdm(ladder, desc="compile", unit="bucket", disable=not progress)):
        started = time.perf_counter()
        compiled = compile_bucket(
            checkpoint.model,
            checkpoint.schema,
            config.layout,
            bucket,
            rows,
            precision=config.export.matmul_precision,
            device=device,
        )
        executables[bucket] = serialize(compiled)
        bar.set_postfix_str(f"{bucket} {time.perf_counter() - started:.1f} s")
    return write_artifact(
        Path(config.export.artifact),
        version=config.export.version,
        model=checkpoint.model,
        schema=checkpoint.schema,
        layout=config.layout,
        target=Target(platform_of(device), device.device_kind, jaxlib_version()),
        matmul_precision=config.export.matmul_precision,
        kernels={"sumi_attention": "xla"},
        weights=served_weights(checkpoint.model, checkpoint.weights),
        item_table=host_item_table(checkpoint.model, checkpoint.weights),
        vocabularies=checkpoint.vocabularies,
        executables=executables,
    )


if __name__ == "__main__":
    main()
