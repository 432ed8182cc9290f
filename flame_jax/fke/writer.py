"""Writing an artifact: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest
from flame_jax.fke.signing import SigningKey


def check_place(path: Path) -> None:
    """Raise ArtifactError when there is something at `path` that is no artifact and would be replaced."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} exists and is no artifact: it is left alone")


def write_artifact(
    path: Path, manifest: Manifest, files: Mapping[str, bytes | np.ndarray], key: SigningKey | None = None
) -> Manifest:
    """Write an artifact beside `path`, then put it there in one rename; an older one there is replaced.

    Args:
        manifest: its `files` are filled in.
        files: content by name; an array becomes a .npy file, written without a copy of it.
        key: signs the manifest.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: something else is at `path`.
        OSError: it can't be written; what was at `path` is left as it was.
    """
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        for name, content in files.items():
            _write(partial / name, content)
        entries = {name: _entry(partial / name) for name in sorted(files)}
        manifest = replace(manifest, files=entries)
        text = (json.dumps(manifest.to_json(), indent=1) + "\n").encode()
        if key is not None:
            _write(partial / SIGNATURE, key.sign(text))
        _write(partial / MANIFEST, text)
        _sync(partial)
        _replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def sign_artifact(path: Path, key: SigningKey) -> None:
    """Sign an artifact that is whole: every file is checked against its hash first. Raises ArtifactError, OSError."""
    artifact = Artifact(path)
    for name in artifact.manifest.files:
        artifact.read(name)
    text = (path / MANIFEST).read_bytes()
    if hashlib.sha256(text).hexdigest() != artifact.digest:
        raise ArtifactError(f"artifact {path} was replaced meanwhile: it is not signed")
    partial = path / f".{SIGNATURE}.{uuid.uuid4().hex}"
    _write(partial, key.sign(text))
    os.replace(partial, path / SIGNATURE)
    _sync(path)


def _write(path: Path, content: bytes | np.ndarray) -> None:
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, path: Path) -> None:
    if path.exists():
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old)
    else:
        os.rename(new, path)
    _sync(path.parent)
