"""Writing an artifact: whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest
from flame_jax.fke.signing import SigningKey

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_place(path: Path) -> Path:
    """Where an artifact for `path` goes: the folder that a link points to, or `path` in full.

    Raises:
        ArtifactError: there is something that is no artifact, or holds more than one, and would be replaced.
    """
    path = Path(os.path.realpath(path))
    if not path.exists():
        return path
    try:
        about = json.loads((path / MANIFEST).read_bytes())
        listed = set(about["files"]) | {MANIFEST, SIGNATURE} if type(about["format"]) is int else set()
        more = sorted(set(os.listdir(path)) - listed)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ArtifactError(f"{path} exists and is no artifact: it is left alone") from None
    if more:
        raise ArtifactError(f"{path} holds more than an artifact ({more[0]!r}): it is left alone")
    return path


def write_artifact(
    path: Path,
    manifest: Manifest,
    files: Mapping[str, bytes | np.ndarray],
    *,
    key: SigningKey | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Manifest:
    """Write an artifact beside `path`, then put it there in one rename; an older one there is replaced.

    Args:
        manifest: its `files` are filled in.
        files: content by name; an array becomes a .npy file, written without a copy of it.
        key: signs the manifest.
        check: called with the folder once it is whole, before it is put at `path`; what it raises stops that.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: something else is at `path`.
        OSError: it can't be written; what was at `path` is left as it was.
    """
    path = check_place(path)
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
        check(partial)
        _put(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def sign_artifact(path: Path, key: SigningKey) -> None:
    """Sign an artifact that is whole: every file is checked against its hash first. Raises ArtifactError, OSError."""
    artifact = Artifact(path)
    for name in artifact.manifest.files:
        artifact.check(name)
    text = (path / MANIFEST).read_bytes()
    if hashlib.sha256(text).hexdigest() != artifact.digest:
        raise ArtifactError(f"artifact {path} was replaced meanwhile: it is not signed")
    partial = path.with_name(f".{path.name}.{SIGNATURE}.{uuid.uuid4().hex}")
    try:
        _write(partial, key.sign(text))
        os.replace(partial, path / SIGNATURE)
    finally:
        partial.unlink(missing_ok=True)
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


def _put(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what is there goes, in the same instant."""
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _exchange(new, path)
        shutil.rmtree(new)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders, atomically (Linux's renameat2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: folders can't be exchanged here; remove the older artifact first")
