"""Artifacts on disk: whole and true, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from flame_jax.fke import engine
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.device import target_of
from flame_jax.fke.manifest import BuiltExecutable, FileEntry, Manifest, executable_name, portable_name
from flame_jax.fke.report import describe
from flame_jax.fke.target import Target
from flame_jax.fke.verify import verify
from flame_jax.vocabulary import Vocabulary
from tests import tiny

FILES = (
    "weights.safetensors",
    "golden.safetensors",
    "vocabulary.npy",
    *(executable_name(bucket) for bucket in tiny.BUCKETS),
    *(portable_name(bucket) for bucket in tiny.BUCKETS),
)


def read_everything(path: Path) -> None:
    """All that a server reads of an artifact before it builds anything."""
    artifact = Artifact(path)
    artifact.vocabularies()
    artifact.weights()
    artifact.tensors("golden.safetensors")
    for bucket in artifact.manifest.buckets:
        artifact.read(executable_name(bucket))
        artifact.read(portable_name(bucket))


def one_line(error: ArtifactError) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def test_what_is_read_is_what_was_written(pristine: Path) -> None:
    artifact = Artifact(str(pristine))
    manifest = artifact.manifest
    assert manifest.version == "7"
    assert manifest.model == tiny.MODEL
    assert manifest.schema == tiny.SCHEMA
    assert manifest.layout == tiny.LAYOUT
    assert manifest.buckets == tiny.BUCKETS
    assert manifest.matmul_precision == "highest"
    assert manifest.kernels == {"sumi_attention": "xla", "post_attention": "xla"}
    assert sorted(manifest.files) == sorted(FILES)
    weights = artifact.weights()
    assert weights.keys() == tiny.random_weights(3).keys()
    assert all(np.array_equal(weights[name], value) for name, value in tiny.random_weights(3).items())
    assert artifact.vocabularies().items.keys.tolist() == sorted(tiny.ITEM_IDS.tolist())
    for bucket, payload in tiny.executables().items():
        assert artifact.read(executable_name(bucket)) == payload
    assert manifest.target == target_of(tiny.device())


def flip(data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[len(data) // 3] ^= 4
    return bytes(damaged)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"", flip, lambda data: data + b"\0", None],
    ids=["truncated", "emptied", "bit flipped", "grown", "deleted"],
)
def test_a_damaged_file_is_refused_by_name_before_it_is_parsed(
    name: str, damage: Callable[[bytes], bytes] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    parsed: list[bytes] = []
    parsers: list[tuple[Any, str]] = [
        (safetensors, "deserialize"),
        (Vocabulary, "from_bytes"),
        (engine, "deserialize"),
        (engine, "lower_program"),
    ]
    for owner, function in parsers:
        real = getattr(owner, function)

        def watched(data: bytes, *args: Any, real: Callable[..., Any] = real) -> Any:
            parsed.append(data)
            return real(data, *args)

        monkeypatch.setattr(owner, function, watched)
    with pytest.raises(ArtifactError, match=name) as caught:
        verify(Artifact(folder), tiny.device())
    assert str(folder) in one_line(caught.value)
    whole = set(tiny.built()[1].values())
    assert whole.issuperset(parsed), "something that is not what the manifest says was parsed"


def test_executables_swapped_with_each_other_are_refused(folder: Path) -> None:
    one, two = (folder / executable_name(bucket) for bucket in tiny.BUCKETS)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(ArtifactError, match=one.name):
        read_everything(folder)


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder: Path) -> None:
    (folder / "more.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"more\.bin"):
        Artifact(folder).read("more.bin")
    with pytest.raises(ArtifactError, match="does not list"):
        Artifact(folder).read("../model/weights.safetensors")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "t32_c16.executable"])
def test_a_link_in_place_of_a_file_is_refused_even_to_the_right_bytes(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match=name):
        read_everything(folder)


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting_for_it(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    os.mkfifo(folder / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        read_everything(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "", ".", "..", "manifest.json", "a\0b"])
def test_a_manifest_that_lists_a_name_that_is_no_plain_file_is_refused(name: str, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="its files are not those of such a model"):
        Artifact(folder)


def test_a_manifest_that_lacks_one_of_its_files_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["t32_c16.stablehlo"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"t32_c16\.stablehlo"):
        Artifact(folder)


def test_a_folder_that_is_a_link_is_read_as_it_was_when_it_was_opened(pristine: Path, tmp_path: Path) -> None:
    """An operator's `current -> 7` may be turned over while it is loaded: what is read is of one version."""
    tiny.save_artifact(tmp_path / "8", version="8")
    (tmp_path / "current").symlink_to(pristine)
    artifact = Artifact(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "8")
    assert artifact.manifest.version == "7"
    assert artifact.read("golden.safetensors")
    assert Artifact(tmp_path / "current").manifest.version == "8"


def test_an_artifact_replaced_after_it_was_opened_gives_no_byte_of_the_new_one(folder: Path) -> None:
    artifact = Artifact(folder)
    tiny.save_artifact(folder, version="8", files={"golden.safetensors": b"of the new one"})
    with pytest.raises(ArtifactError, match="lacks"):
        artifact.read("golden.safetensors")


def test_a_file_swapped_between_check_and_use_is_of_no_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parsed are the bytes that were hashed: the file is opened once."""
    opened: list[str] = []
    real = os.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(str(path))
        return real(path, *args, **kwargs)

    artifact = Artifact(folder)
    monkeypatch.setattr(os, "open", counting)
    artifact.weights()
    assert opened == ["weights.safetensors"]


def test_a_half_written_version_is_no_artifact(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        Artifact(folder)


def test_a_manifest_beyond_all_size_is_not_read_into_memory(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=r"unreadable manifest\.json"):
        Artifact(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "vocabulary.npy").unlink()
    (folder / "vocabulary.npy").mkdir()
    with pytest.raises(ArtifactError, match=r"vocabulary\.npy"):
        read_everything(folder)


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("a file")],
    ids=["nothing", "an empty folder", "a file"],
)
def test_where_there_is_no_artifact_one_line_says_so(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(ArtifactError) as caught:
        Artifact(tmp_path / "model")
    assert str(tmp_path / "model") in one_line(caught.value)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"format"',
        b"{}",
        b'{"format": 3}',
        b'{"format": 2}',
        b'{"format": 4}',
        b'{"format": "3"}',
        b'{"format": 3.0}',
        b"\xff\xfe\x00",
        b"\0" * 100,
        b"[" * 200_000,
        b'{"format": 3, "schema": ' + b"[" * 200_000,
    ],
    ids=lambda junk: str(junk[:24]),
)
def test_a_manifest_of_junk_or_another_format_is_refused(junk: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(junk)
    with pytest.raises(ArtifactError, match=r"manifest\.json|format 3") as caught:
        Artifact(folder)
    one_line(caught.value)


JUNK: tuple[Any, ...] = (None, True, -1, 0, 2.5, 10**30, "x", "", [], [None], [[1, 2]], {}, {"x": 1})


def mutations(data: Any) -> list[tuple[str, Any]]:
    """Copies of a JSON document with one value, at any depth, dropped or replaced by junk."""
    out: list[tuple[str, Any]] = []
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    for key in keys:
        dropped = data.copy()
        del dropped[key]
        out.append((f"{key} dropped", dropped))
        for junk in JUNK:
            changed = data.copy()
            changed[key] = junk
            out.append((f"{key} = {junk!r}", changed))
        for where, value in mutations(data[key]):
            changed = data.copy()
            changed[key] = value
            out.append((f"{key}.{where}", changed))
    return out


def test_a_manifest_with_any_one_value_wrong_is_refused_in_one_line_or_read(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    escaped = []
    for where, changed in mutations(manifest):
        (folder / "manifest.json").write_text(json.dumps(changed))
        try:
            read_everything(folder)
            describe(Artifact(folder))
        except ArtifactError as error:
            one_line(error)
        except Exception as error:
            escaped.append(f"{where}: {error!r}")
    assert escaped == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("weights.safetensors", b""),
        ("weights.safetensors", b"junk" * 9),
        ("weights.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
        ("weights.safetensors", (2**24).to_bytes(8, "little") + b"{}"),
        ("weights.safetensors", safetensors.numpy.save({"a": np.ones(3, np.float32)})[:-1]),
        ("vocabulary.npy", b""),
        ("vocabulary.npy", b"junk" * 9),
        ("vocabulary.npy", b"\x93NUMPY"),
        ("vocabulary.npy", b"PK\x03\x04junk"),
        ("vocabulary.npy", b"\x80\x04]q\x00."),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else repr(value[:10]),
)
def test_a_file_of_junk_whose_hash_is_right_is_refused(name: str, data: bytes, folder: Path) -> None:
    tiny.forge(folder, name, data)
    with pytest.raises(ArtifactError) as caught:
        read_everything(folder)
    assert str(folder) in one_line(caught.value)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1.5, 2.5]),
        np.array([1, 2], np.int32),
        np.array([1, 2, 1], np.int64),
        np.array([-1, 2], np.int64),
        np.ones((2, 2), np.int64),
        np.array(["a", "b"]),
        np.array(7, np.int64),
    ],
    ids=repr,
)
def test_a_vocabulary_that_is_no_set_of_ids_is_refused(ids: np.ndarray, folder: Path) -> None:
    np.save(folder / "vocabulary.npy", ids)
    tiny.forge(folder, "vocabulary.npy", (folder / "vocabulary.npy").read_bytes())
    with pytest.raises(ArtifactError, match="vocabulary"):
        Artifact(folder).vocabularies()


def test_every_setting_of_an_artifact_takes_part_in_the_round_trip() -> None:
    """A field that `from_json` forgets would silently be a default."""
    changed = Manifest(
        version="9",
        created="2026-01-02T03:04:05+00:00",
        versions={"jax": "1"},
        model=dataclasses.replace(tiny.MODEL, name="other", layers=3, dtype="bfloat16"),
        schema=dataclasses.replace(tiny.SCHEMA, block_length=8, scenarios=("one",)),
        layout=dataclasses.replace(tiny.LAYOUT, align=16, max_requests=9),
        target=Target("cuda", "H100", "9.0", "0.0", "plugin 1", ("avx",)),
        platforms=("cuda",),
        matmul_precision="default",
        kernels={"a": "triton"},
        executables=tuple(BuiltExecutable(bucket, 5, 6, 7.5, "file") for bucket in tiny.BUCKETS),
        golden_tolerance=0.125,
    )
    changed = dataclasses.replace(changed, files={name: FileEntry(3, "00") for name in changed.file_names()})
    assert Manifest.from_json(json.loads(json.dumps(changed.to_json()))) == changed
