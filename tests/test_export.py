"""From checkpoint to artifact, through the command line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from flame_jax import export as module
from flame_jax.config import Config
from flame_jax.export import export, main
from flame_jax.fke.artifact import Artifact, executable_name, jaxlib_version
from flame_jax.fke.engine import Engine
from flame_jax.models.checkpoint import load_checkpoint
from flame_jax.models.serving import rank_function, weight_specs
from flame_jax.packing import Bucket, Extent
from tests import tiny


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose artifact was exported from a trained checkpoint."""
    config = dataclasses.replace(tiny.trained_run().config, layout=tiny.LAYOUT)
    folder = tmp_path_factory.mktemp("export")
    config = dataclasses.replace(
        config, export=dataclasses.replace(config.export, artifact=str(folder / "deep" / "artifact"))
    )
    main(["--config", tiny.write_config(config, folder / "config.yaml")])
    return config


def test_an_engine_of_the_artifact_scores_as_the_trained_model_does(exported: Config) -> None:
    checkpoint = load_checkpoint(exported.train.checkpoint)
    engine = Engine(Artifact(exported.export.artifact), tiny.device())
    engine.warm()
    assert engine.vocabularies.items.keys.tolist() == checkpoint.vocabularies.items.keys.tolist()
    rows = checkpoint.vocabularies.items.rows
    order = weight_specs(tiny.model(vocabulary=rows))
    words, slot = tiny.packed_slot(tiny.BUCKETS[1], [Extent(12, 9), Extent(3, 4)])
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(rank_function(tiny.MODEL, tiny.SCHEMA, tiny.LAYOUT, slot, rows))
        right = np.asarray(plain([checkpoint.weights[name] for name in order], words))
    np.testing.assert_allclose(np.asarray(engine.launch(tiny.BUCKETS[1], words)), right, rtol=1e-6, atol=1e-7)


def test_the_artifact_says_what_it_is(exported: Config) -> None:
    manifest = Artifact(exported.export.artifact).manifest
    assert manifest.version == "7"
    assert manifest.model == tiny.MODEL
    assert manifest.schema == tiny.SCHEMA
    assert manifest.layout == tiny.LAYOUT
    assert manifest.buckets == tiny.BUCKETS
    assert manifest.matmul_precision == "highest"
    assert manifest.target.platform == tiny.platform()
    assert manifest.target.jaxlib == jaxlib_version()
    assert sorted(os.listdir(exported.export.artifact)) == sorted(["manifest.json", *manifest.files])
    assert {executable_name(bucket) for bucket in tiny.BUCKETS} <= manifest.files.keys()
    assert os.listdir(Path(exported.export.artifact).parent) == ["artifact"]


def test_exporting_again_replaces_the_artifact_and_says_where_it_is(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(
        exported.export, artifact=str(tmp_path / "artifact"), version="8", buckets=(tiny.BUCKETS[1],)
    )
    tiny.save_artifact(tmp_path / "artifact", executables={tiny.BUCKETS[0]: b"of an older export"})
    main(["--config", tiny.write_config(dataclasses.replace(exported, export=settings), tmp_path / "config.yaml")])
    artifact = Artifact(tmp_path / "artifact")
    assert artifact.manifest.version == "8"
    assert artifact.manifest.buckets == (tiny.BUCKETS[1],)
    assert not (tmp_path / "artifact" / executable_name(tiny.BUCKETS[0])).exists()
    printed = capsys.readouterr().out.strip()
    assert "\n" not in printed
    assert str(tmp_path / "artifact") in printed
    assert "climber version 8" in printed


@pytest.fixture
def saved(tmp_path: Path) -> Config:
    """A configuration whose checkpoint has random weights, and no artifact yet."""
    tiny.save_checkpoint(tmp_path / "checkpoint", 1)
    return dataclasses.replace(tiny.config(tmp_path), layout=tiny.LAYOUT)


def refusal(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--config", tiny.write_config(config, tmp_path / "config.yaml")])
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(module.PROG)]
    assert len(lines) == 1
    assert not (tmp_path / "artifact").exists()
    return lines[0]


def test_a_missing_checkpoint_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(tiny.config(tmp_path), tmp_path, capsys)
    assert str(tmp_path / "checkpoint") in line
    assert "flame_jax.train" in line


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("model", {"width": 32}),
        ("model", {"layers": 3}),
        ("schema", {"scenarios": ("home",)}),
        ("schema", {"block_length": 8}),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_checkpoint_ends_with_one_line_that_names_the_field(
    section: str, changed: dict[str, object], saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = dataclasses.replace(getattr(saved, section), **changed)
    line = refusal(dataclasses.replace(saved, **{section: part}), tmp_path, capsys)
    assert f"{section}.{next(iter(changed))}" in line


@pytest.mark.parametrize(
    ("buckets", "said"),
    [
        ((), "buckets"),
        (((60, 16),), "align"),
        (((16, 32),), "candidates <= tokens"),
        (((16, 8),), "block_length"),
    ],
    ids=str,
)
def test_a_ladder_that_cannot_serve_the_schema_ends_with_one_line(
    buckets: tuple[tuple[int, int], ...],
    said: str,
    saved: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = dataclasses.replace(saved.export, buckets=buckets)
    assert said in refusal(dataclasses.replace(saved, export=settings), tmp_path, capsys)


def test_a_checkpoint_without_one_of_the_models_weights_is_refused(saved: Config, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved.train.checkpoint)
    weights = {name: value for name, value in checkpoint.weights.items() if name != "item_bias"}
    with pytest.raises(ValueError, match="missing item_bias"):
        export(saved, dataclasses.replace(checkpoint, weights=weights), tiny.device(), progress=False)
    assert not (tmp_path / "artifact").exists()


def test_a_place_that_cannot_be_written_ends_with_one_line(
    saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "compile_bucket", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "serialize", lambda compiled: b"stands in for an executable")
    settings = dataclasses.replace(saved.export, artifact=str(tmp_path / "file" / "artifact"))
    assert "file" in refusal(dataclasses.replace(saved, export=settings), tmp_path, capsys)


def test_one_bucket_given_twice_is_compiled_once(
    saved: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Bucket] = []

    def compile_bucket(model: object, schema: object, layout: object, bucket: Bucket, *_: object, **__: object) -> None:
        compiled.append(bucket)

    monkeypatch.setattr(module, "compile_bucket", compile_bucket)
    monkeypatch.setattr(module, "serialize", lambda executable: b"stands in for an executable")
    settings = dataclasses.replace(saved.export, buckets=((64, 32), (32, 16), (64, 32)))
    manifest = export(
        dataclasses.replace(saved, export=settings), load_checkpoint(saved.train.checkpoint), tiny.device()
    )
    assert compiled == list(tiny.BUCKETS) == list(manifest.buckets)
