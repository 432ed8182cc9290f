"""Writing artifacts: whole or not at all, and never over something else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_jax.fke import writer
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.build import tensor_bytes
from flame_jax.fke.manifest import Manifest
from flame_jax.fke.writer import write_artifact
from tests import tiny


def test_the_manifest_returned_is_the_one_on_disk(tmp_path: Path) -> None:
    written = tiny.save_artifact(tmp_path / "deep" / "model")
    assert Artifact(tmp_path / "deep" / "model").manifest == written
    assert Manifest.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_weights_of_any_memory_layout_are_written_in_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = tensor_bytes({"turned": values.T, "strided": values[:, ::2]})
    tiny.save_artifact(tmp_path / "a", files={"weights.safetensors": file})
    weights = Artifact(tmp_path / "a").weights()
    assert weights["turned"].tolist() == values.T.tolist()
    assert weights["strided"].tolist() == values[:, ::2].tolist()


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_an_older_artifact_is_replaced_whole_and_nothing_else_is_left(folder: Path) -> None:
    written = tiny.save_artifact(folder, version="8")
    assert Artifact(folder).manifest == written
    assert sorted(os.listdir(folder)) == sorted(["manifest.json", *written.files])
    assert os.listdir(folder.parent) == ["model"]


class DiskFull:
    """Stands in for a function: the call of this number fails."""

    def __init__(self, function: Callable[..., Any], fails_at: int) -> None:
        self._function, self._left = function, fails_at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise OSError(28, "No space left on device")
        return self._function(*args, **kwargs)


@pytest.mark.parametrize("older", [False, True], ids=["first", "replacing"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Path, "open", 2),
        (Path, "open", 3),
        (Path, "open", 9),
        (os, "fsync", 1),
        (os, "fsync", 9),
        (os, "rename", 1),
        (writer, "_exchange", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    owner: Any, name: str, call: int, older: bool, tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, path = tmp_path / "models", tmp_path / "models" / "model"
    if older:
        shutil.copytree(pristine, path)
        before = snapshot(path)
    elif name == "_exchange":
        pytest.skip("there is nothing to exchange a first artifact with")
    failing = DiskFull(getattr(owner, name), call)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))
    with pytest.raises(OSError, match="No space left"):
        tiny.save_artifact(path, version="8")
    monkeypatch.undo()
    assert os.listdir(parent) == (["model"] if older else [])
    if older:
        assert snapshot(path) == before


@pytest.mark.parametrize("manifest", [None, '{"name": "my web app"}', '{"format": 3, "files": {}}', "junk"])
def test_a_folder_that_is_no_artifact_is_not_deleted(manifest: str | None, tmp_path: Path) -> None:
    precious = tmp_path / "home"
    (precious / "thesis").mkdir(parents=True)
    (precious / "thesis" / "final.txt").write_text("years of work")
    if manifest is not None:
        (precious / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match="left alone"):
        tiny.save_artifact(precious)
    assert (precious / "thesis" / "final.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["home"]


def test_something_added_to_an_artifact_is_not_deleted_with_it(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt.*left alone"):
        tiny.save_artifact(folder, version="8")
    assert Artifact(folder).manifest.version == "7"


def test_an_artifact_is_written_to_where_a_link_points(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    tiny.save_artifact(tmp_path / "current", version="8")
    assert (tmp_path / "current").is_symlink()
    assert Artifact(folder).manifest.version == "8"
    assert sorted(os.listdir(tmp_path)) == ["current", "model"]


def test_there_is_an_artifact_at_every_moment_while_it_is_replaced(folder: Path) -> None:
    stop, missing, seen = threading.Event(), [], 0

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            tiny.save_artifact(folder, version=str(number))

    writers = [threading.Thread(target=replace) for _ in range(2)]
    for writer_thread in writers:
        writer_thread.start()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        try:
            os.stat(folder)
        except FileNotFoundError as error:
            missing.append(error)
        seen += 1
    stop.set()
    for writer_thread in writers:
        writer_thread.join()
    assert seen > 100
    assert missing == []
    assert os.listdir(folder.parent) == ["model"]
    artifact = Artifact(folder)
    for name in artifact.manifest.files:
        artifact.check(name)


def test_a_check_that_fails_leaves_what_was_there(folder: Path) -> None:
    before = snapshot(folder)

    def refuse(partial: Path) -> None:
        assert Artifact(partial).manifest.version == "8"
        raise ArtifactError("no good")

    manifest, files = tiny.built()
    with pytest.raises(ArtifactError, match="no good"):
        write_artifact(folder, dataclasses.replace(manifest, version="8"), files, check=refuse)
    assert snapshot(folder) == before
    assert os.listdir(folder.parent) == ["model"]


def test_a_file_where_the_artifact_should_go_is_not_moved_away(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises((ArtifactError, OSError, ValueError)):
        tiny.save_artifact(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model").read_text() == "a file"
