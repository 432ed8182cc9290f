"""Artifacts with fused kernels, built for an H100 that is not here; needs the CUDA plugin (`make cross`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from flame_jax.config import Config
from flame_jax.export import export as run_export
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.manifest import executable_name
from flame_jax.models.checkpoint import Checkpoint, CheckpointFolder
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import flat_weights
from flame_jax.packing import Bucket, Layout
from tests import tiny
from tests.fke.test_cross import export, needs_plugin

BUCKET = Bucket(256, 64)
FUSED = ("--export.kernels", "auto")


def settings(folder: Path) -> Config:
    """A model that the kernels can do."""
    small = tiny.config(folder)
    model = dataclasses.replace(tiny.MODEL, width=64, head_dim=32, ffn=64, dtype="bfloat16")
    buckets = dataclasses.replace(small.export, buckets=(BUCKET,), matmul_precision="default")
    return dataclasses.replace(small, model=model, layout=Layout(align=64, max_requests=4), export=buckets)


def save_checkpoint(config: Config) -> None:
    """Random weights."""
    random = np.random.default_rng(0)
    model = make_ranker(config.model, config.schema, tiny.ITEMS + 1, rngs=nnx.Rngs(0))
    weights = {n: (w + 0.05 * random.normal(size=w.shape)).astype(w.dtype) for n, w in flat_weights(model).items()}
    with CheckpointFolder(Path(config.train.checkpoint)) as folder:
        folder.save(Checkpoint(1, config.model, config.schema, tiny.vocabularies(), weights, []))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("fused")
    config = settings(folder)
    save_checkpoint(config)
    return tiny.write_config(config, folder / "config.yaml")


@needs_plugin
def test_a_build_for_an_h100_holds_fused_kernels(config_file: str, tmp_path: Path) -> None:
    out = tmp_path / "h100"
    done = export("build", "--config", config_file, "--device-kind", "h100", "--out", str(out), *FUSED)
    assert done.returncode == 0, done.stderr
    manifest = Artifact(out).manifest
    assert manifest.kernels == {"sumi_attention": "mosaic", "post_attention": "mosaic"}
    assert manifest.platforms == ("cuda",)
    assert b"mosaic" in Artifact(out).read(executable_name(BUCKET))

    done = export("build", "--from", str(out), "--platform", "cpu", "--out", str(tmp_path / "cpu"))
    assert done.returncode == 1
    assert "holds fused kernels for compute capability 9.0: build from the checkpoint" in done.stderr
    assert not (tmp_path / "cpu").exists()


@needs_plugin
def test_who_wants_no_kernels_gets_programs_for_every_platform(config_file: str, tmp_path: Path) -> None:
    out, again = tmp_path / "h100", tmp_path / "again"
    flags = ("--device-kind", "h100", "--export.kernels", "xla")
    done = export("build", "--config", config_file, *flags, "--out", str(out))
    assert done.returncode == 0, done.stderr
    manifest = Artifact(out).manifest
    assert set(manifest.kernels.values()) == {"xla"}
    assert manifest.platforms == ("cpu", "cuda")
    done = export("build", "--from", str(out), "--device-kind", "h100", "--out", str(again))
    assert "holds no fused kernels" in done.stderr


def test_kernels_that_the_device_lacks_are_refused(config_file: str, tmp_path: Path) -> None:
    config = settings(tmp_path)
    wanted = dataclasses.replace(config.export, kernels="mosaic")
    save_checkpoint(config)
    with pytest.raises(ValueError, match=r"kernels are for compute capability 9\.0, this is no GPU"):
        run_export(dataclasses.replace(config, export=wanted), tiny.builder())
    assert not Path(wanted.artifact).exists()
