"""Which versions a model repository holds, and in which order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_jax.fke.repository import Repository, RepositoryError, SingleArtifact, is_plain, natural_key


def version(root: Path, name: str, manifest: str = "{}") -> Path:
    folder = root / "m" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    return folder


def names(root: Path) -> list[str]:
    return [found.name for found in Repository(root).versions()]


def test_versions_come_newest_first_with_digits_as_numbers(tmp_path: Path) -> None:
    ordered = ["2024-11-02", "v10", "v9", "v1.12", "v1.2", "10", "9", "1-rc2", "1"]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    for name in shuffled:
        version(tmp_path, name)
    assert names(tmp_path) == ["v10", "v9", "v1.12", "v1.2", "2024-11-02", "10", "9", "1-rc2", "1"]


def test_only_newer_versions_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8, 13):
        version(tmp_path, str(number))
    repository, read, right = Repository(tmp_path), list[str](), Path.read_bytes

    def reading(path: Path) -> bytes:
        read.append(path.parent.name)
        return right(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    assert [found.name for found in repository.versions("10")] == ["12", "11"]
    assert read == ["12", "11"]
    assert repository.versions("12") == []


@given(st.lists(st.integers(0, 10**30), min_size=2, max_size=8, unique=True), st.sampled_from(["", "v", "a1b"]))
def test_numbered_names_sort_as_their_numbers(numbers: list[int], prefix: str) -> None:
    by_name = sorted((f"{prefix}{number}" for number in numbers), key=natural_key)
    assert by_name == [f"{prefix}{number}" for number in sorted(numbers)]


@given(st.lists(st.text(max_size=6), max_size=6, unique=True))
def test_any_names_have_one_order(texts: list[str]) -> None:
    """No two names compare equal, and none can't be compared: 01 and 1, letters and digits, digits of any script."""
    shuffled = random.Random(0).sample(texts, len(texts))
    assert sorted(texts, key=natural_key) == sorted(shuffled, key=natural_key)


def test_hidden_folders_links_files_and_odd_names_are_not_taken(tmp_path: Path) -> None:
    good = version(tmp_path, "1")
    version(tmp_path, ".2.partial")
    version(tmp_path, "3\n")
    version(tmp_path, "4\\5")
    version(tmp_path, "6" * 129)
    os.makedirs(os.fsencode(tmp_path / "m") + b"/7\xff")
    (tmp_path / "m" / "8").symlink_to(good)
    (tmp_path / "m" / "9").write_text("")
    assert names(tmp_path) == ["1"]
    repository = Repository(tmp_path)
    for name in ("", ".", "..", "../m/1", "1/", "/", ".2.partial", "8", "9", "10", "3\n", "6" * 129, "1\0"):
        assert repository.find(name) is None, name
    found = repository.find("1")
    assert found is not None
    assert found.path == good


def test_names_may_have_128_bytes_of_any_script(tmp_path: Path) -> None:
    version(tmp_path, "é" * 64)
    assert names(tmp_path) == ["é" * 64]
    assert not is_plain("é" * 64 + "1")


def test_a_folder_without_a_manifest_is_incomplete_until_it_comes(tmp_path: Path) -> None:
    version(tmp_path, "1")
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "2" / "weights.safetensors").write_bytes(b"half")
    repository = Repository(tmp_path)
    assert [v.name for v in repository.versions()] == ["1"]
    (tmp_path / "m" / "2" / "manifest.json").write_text("{}")
    assert [v.name for v in repository.versions()] == ["2", "1"]


def test_another_manifest_or_another_file_is_another_identity(tmp_path: Path) -> None:
    folder = version(tmp_path, "1")
    (folder / "weights").write_bytes(b"abc")
    os.utime(folder / "weights", ns=(1, 1))

    def identity() -> str:
        found = Repository(tmp_path).find("1")
        assert found is not None
        return found.identity

    seen = [identity(), identity()]
    assert seen[0] == seen[1]
    (folder / "weights").write_bytes(b"abd")
    seen.append(identity())
    (folder / "manifest.json").write_text('{"a": 1}')
    seen.append(identity())
    (folder / "more").write_bytes(b"")
    seen.append(identity())
    assert len(set(seen)) == 4


def test_a_manifest_that_is_no_file_is_there_so_that_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "m" / "1" / "manifest.json").mkdir(parents=True)
    assert names(tmp_path) == ["1"]


def test_the_only_model_need_not_be_named(tmp_path: Path) -> None:
    version(tmp_path, "1")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    assert Repository(tmp_path).model == "m"
    (tmp_path / "other").mkdir()
    with pytest.raises(RepositoryError, match=r"name one model with server\.model: .* holds m, other"):
        Repository(tmp_path)
    assert Repository(tmp_path, "other").versions() == []


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="none can't be read: No such file"):
        Repository(tmp_path / "none")
    with pytest.raises(RepositoryError, match="holds nothing"):
        Repository(tmp_path)
    version(tmp_path, "1")
    for name in ("n", "..", "m/1", "../x"):
        with pytest.raises(RepositoryError, match=r"has no model .*: it holds m"):
            Repository(tmp_path, name)
    repository = Repository(tmp_path)
    (tmp_path / "m").rename(tmp_path / "gone")
    with pytest.raises(RepositoryError, match="m can't be read"):
        repository.versions()


def test_a_single_artifact_is_a_version_by_its_manifests_name(tmp_path: Path) -> None:
    folder = version(tmp_path, "whatever", '{"version": "7"}')
    source = SingleArtifact(folder)
    (found,) = source.versions()
    assert (found.name, found.path) == ("7", folder)
    assert source.find("7") == found
    assert source.find("whatever") is None
    (folder / "manifest.json").write_text("[" * 100_000)
    (unreadable,) = source.versions()
    assert unreadable.name == ""
    assert unreadable.identity != found.identity
    (missing,) = SingleArtifact(tmp_path / "none").versions()
    assert (missing.name, missing.identity) == ("", "")


def test_no_jax_is_loaded() -> None:
    probe = "import sys, flame_jax.fke.repository; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
