"""From checkpoint to artifact, through the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flame_jax import export as module
from flame_jax.config import Config
from flame_jax.export import main
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.build import Builder, Built, build
from flame_jax.fke.device import target_of
from flame_jax.fke.engine import Engine
from flame_jax.fke.manifest import executable_name, portable_name
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
    main(["build", "--config", tiny.write_config(config, folder / "config.yaml")])
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
    assert manifest.target == target_of(tiny.device())
    assert manifest.platforms == ("cpu", "cuda")
    assert {"flame-jax", "jax", "jaxlib"} <= manifest.versions.keys()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(manifest.created)).total_seconds()) < 3600
    assert all(e.compile_seconds > 0 and e.flops > 0 and e.temp_bytes > 0 for e in manifest.executables)
    assert sorted(os.listdir(exported.export.artifact)) == sorted(["manifest.json", *manifest.files])
    assert {
        name(bucket) for bucket in tiny.BUCKETS for name in (executable_name, portable_name)
    } <= manifest.files.keys()
    assert os.listdir(Path(exported.export.artifact).parent) == ["artifact"]


def test_exporting_again_replaces_the_artifact_and_says_where_it_is(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(
        exported.export, artifact=str(tmp_path / "artifact"), version="8", buckets=(tiny.BUCKETS[1],)
    )
    tiny.save_artifact(tmp_path / "artifact")
    main(
        [
            "build",
            "--config",
            tiny.write_config(dataclasses.replace(exported, export=settings), tmp_path / "config.yaml"),
        ]
    )
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
        main(["build", "--config", tiny.write_config(config, tmp_path / "config.yaml")])
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
        build(saved, dataclasses.replace(checkpoint, weights=weights), tiny.builder())
    assert not (tmp_path / "artifact").exists()


def test_a_place_that_cannot_be_written_ends_with_one_line(
    saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(Builder, "compile", lambda self, programs: dict.fromkeys(programs, Built(b"", 1.0, 2, "")))
    settings = dataclasses.replace(saved.export, artifact=str(tmp_path / "file" / "artifact"))
    assert "file" in refusal(dataclasses.replace(saved, export=settings), tmp_path, capsys)


def test_one_bucket_given_twice_is_compiled_once(
    saved: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Bucket] = []

    real = Builder.compile

    def compile_all(self: Builder, programs: dict[Bucket, bytes]) -> dict[Bucket, Built]:
        compiled.extend(programs)
        return real(self, programs)

    monkeypatch.setattr(Builder, "compile", compile_all)
    settings = dataclasses.replace(saved.export, buckets=((64, 32), (32, 16), (64, 32)))
    manifest = build(
        dataclasses.replace(saved, export=settings), load_checkpoint(saved.train.checkpoint), tiny.builder()
    )
    assert compiled == list(tiny.BUCKETS) == list(manifest.buckets)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command prints."""
    capsys.readouterr()
    main(list(args))
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(module.PROG)]
    assert len(lines) == 1
    return lines[0]


def test_inspect_prints_a_table_and_the_same_as_json(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported.export.artifact
    about = json.loads(run(capsys, "inspect", path, "--json"))
    manifest = Artifact(path).manifest
    assert [e["bucket"] for e in about["executables"]] == [str(b) for b in manifest.buckets]
    assert [e["flops"] for e in about["executables"]] == [e.flops for e in manifest.executables]
    assert about["bytes"] == sum((Path(path) / name).stat().st_size for name in manifest.files)
    assert not about["signed"]
    shown = run(capsys, "inspect", path)
    for bucket in manifest.buckets:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{bucket} ")]
        assert "sumi_attention=xla" in line
    # Nothing but the manifest is read: an artifact that has lost its weights can still be looked at.
    shutil.copytree(path, tmp_path / "broken")
    (tmp_path / "broken" / "weights.safetensors").unlink()
    assert "version 7" in run(capsys, "inspect", str(tmp_path / "broken"))


def test_verify_passes_what_a_server_takes_and_says_what_it_compared(
    exported: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(capsys, "verify", exported.export.artifact)
    assert "good" in shown
    about = json.loads(run(capsys, "verify", exported.export.artifact, "--json"))
    assert about["failed"] == []
    for bucket in about["buckets"]:
        assert bucket["requests"] >= 3
        assert bucket["placements"] >= bucket["requests"] + 3
        assert bucket["moved"] == 0
        assert bucket["golden"] < 1e-5


@pytest.mark.parametrize("name", ["weights.safetensors", "t64_c32.stablehlo", "t64_c32.executable"])
def test_verify_reads_every_file(
    name: str, exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported.export.artifact, tmp_path / "broken")
    data = bytearray((tmp_path / "broken" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "broken" / name).write_bytes(data)
    assert f"{name} does not match its hash" in fails(capsys, "verify", str(tmp_path / "broken"))


def test_keys_are_made_once_sign_and_are_asked_for(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, path = str(tmp_path / "key"), str(tmp_path / "artifact")
    shutil.copytree(exported.export.artifact, path)
    assert f"{key}.pub" in run(capsys, "keygen", key)
    assert "exists" in fails(capsys, "keygen", key)
    assert "is not signed" in fails(capsys, "verify", path, "--trusted-key", f"{key}.pub")
    run(capsys, "sign", path, "--key", key)
    run(capsys, "verify", path, "--trusted-key", f"{key}.pub")
    run(capsys, "keygen", f"{key}2")
    assert "not signed by" in fails(capsys, "verify", path, "--trusted-key", f"{key}2.pub")
    assert f"{key} can't be read" in fails(capsys, "verify", path, "--trusted-key", key)


def test_a_signed_source_is_not_signed_again_unless_its_signature_was_checked(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, source, out = str(tmp_path / "key"), str(tmp_path / "source"), str(tmp_path / "out")
    shutil.copytree(exported.export.artifact, source)
    run(capsys, "keygen", key)
    run(capsys, "sign", source, "--key", key)
    rebuild = ["build", "--from", source, "--out", out]
    assert "--trusted-key" in fails(capsys, *rebuild, "--key", key)
    run(capsys, *rebuild, "--key", key, "--trusted-key", f"{key}.pub")
    run(capsys, "verify", out, "--trusted-key", f"{key}.pub")
    capsys.readouterr()
    main(rebuild)
    assert "is not signed, its source was" in capsys.readouterr().err
    (Path(source) / "manifest.json").write_text((Path(source) / "manifest.json").read_text().replace("7", "8", 1))
    assert "not signed by" in fails(capsys, *rebuild, "--trusted-key", f"{key}.pub")


@pytest.mark.parametrize(("spoil", "said"), [("moved", "beyond the tolerance"), ("golden", "spread off")])
def test_verify_fails_what_is_not_invariant_or_not_golden(
    spoil: str, said: str, exported: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Engine.run, count()

    def wrong(self: Engine, *batch: Any) -> np.ndarray:
        scores, number = real(self, *batch), next(calls)
        return scores * np.float32(0.8) if spoil == "golden" or number % 2 else scores

    monkeypatch.setattr(Engine, "run", wrong)
    if spoil == "moved":
        monkeypatch.setattr(Engine, "warm", lambda self: None)
    assert said in fails(capsys, "verify", exported.export.artifact)


def test_a_build_whose_executables_score_wrongly_is_not_put_in_place(
    saved: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_artifact(Path(saved.export.artifact))
    before = Artifact(saved.export.artifact).digest
    real = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, *batch: real(self, *batch) * np.float32(0.5))
    with pytest.raises(ArtifactError, match="spread off"):
        build(saved, load_checkpoint(saved.train.checkpoint), tiny.builder())
    assert Artifact(saved.export.artifact).digest == before


def test_ctrl_c_ends_a_build_with_one_line_and_leaves_nothing(
    saved: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flame_jax.fke.build.lower_program", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["build", "--config", tiny.write_config(saved, tmp_path / "config.yaml")])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not Path(saved.export.artifact).exists()


def test_build_from_another_artifact_keeps_everything_but_the_executables(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = exported.export.artifact, str(tmp_path / "again")
    run(capsys, "build", "--from", source, "--platform", "cpu", f"--out={out}")
    old, new = Artifact(source).manifest, Artifact(out).manifest
    changed = {n for n in old.files.keys() | new.files.keys() if old.files.get(n) != new.files.get(n)}
    assert all(name.endswith(".executable") for name in changed)
    assert (new.version, new.schema, new.model, new.buckets) == (old.version, old.schema, old.model, old.buckets)
    assert "good" in run(capsys, "verify", out)


def test_an_artifact_can_be_rebuilt_after_its_executables_are_lost(
    exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported.export.artifact, tmp_path / "lost")
    for bucket in tiny.BUCKETS:
        (tmp_path / "lost" / executable_name(bucket)).unlink()
    assert "lacks" in fails(capsys, "verify", str(tmp_path / "lost"))
    run(capsys, "build", "--from", str(tmp_path / "lost"), "--out", str(tmp_path / "again"))
    assert "good" in run(capsys, "verify", str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name a command"),
        (["bild"], "name a command"),
        (["build", "--from"], "argument --from"),
        (["build", "--from", "x"], "required: --out"),
        (["build", "--from", "x", "--out", "y", "--export.version", "9"], "unrecognized arguments: --export.version"),
        (["verify"], "required: DIR"),
        (["sign", "x"], "required: --key"),
        (["build", "--from", "/none", "--out", "y"], "no artifact at /none"),
        (["build", "--platform", "tpu"], "export.platform"),
        (["build", "--platform", "cuda"], "no cuda device"),
        (["build", "--device-kind", "z80"], "there is h100"),
        (["build", "--device-kind", "h100", "--platform", "cpu"], "export.platform is cpu"),
        (["build", "--tuned", "/none/tuned.json"], "/none/tuned.json"),
        (["build", "--key", "/none/key"], "/none/key"),
        (["inspect", "/none"], "no artifact at /none"),
        (["verify", "/none"], "no artifact at /none"),
        (["sign", "/none", "--key", "/none/key"], "/none/key"),
        (["tune", "/none", "--out", "x"], "no artifact at /none"),
    ],
    ids=str,
)
def test_a_command_called_wrongly_ends_with_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fails(capsys, *args)


def test_tuning_needs_the_device(exported: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "tune", exported.export.artifact, "--out", str(tmp_path / "tuned.json"))
    assert "needs a CUDA device" in line
