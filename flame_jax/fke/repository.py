"""Where versions of one model lie on disk: a repository `ROOT/MODEL/VERSION/`, or one artifact's folder. No JAX."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from flame_jax.fke.manifest import MANIFEST

MAX_NAME = 128
"""Bytes of a model's or a version's name at most."""


class RepositoryError(Exception):
    """The repository can't be read or doesn't tell what to serve; the message is one clear line."""


class Version(NamedTuple):
    """One version's folder.

    Attributes:
        identity: of its manifest's bytes and of its files' sizes and times: another one deserves another try.
    """

    name: str
    path: Path
    identity: str


class Source(Protocol):
    """Where versions come from.

    Attributes:
        model: name that every manifest must have; empty when the first one tells.
    """

    model: str

    def versions(self, newer_than: str | None = None) -> list[Version]:
        """Versions that may be complete, newest first; only the newer ones are looked into. Raises RepositoryError."""

    def find(self, name: str) -> Version | None:
        """The version of this name, if there is one. Raises RepositoryError."""

    def refusal(self, tried: Mapping[str, str]) -> str:
        """One line that says why nothing can be served, given what was tried and each reason."""


class Repository:
    """Versions of one model in a model repository. Hidden folders and symbolic links are never taken.

    Args:
        root: folder of models.
        model: folder of versions in it; may be empty when there is one model only.

    Raises:
        RepositoryError: no such folder, or several models and none named.
    """

    def __init__(self, root: str | Path, model: str = "") -> None:
        models = _folders(Path(root))
        known = ", ".join(sorted(models)) or "nothing"
        if model and model not in models:
            raise RepositoryError(f"server.models_dir {root} has no model {model!r}: it holds {known}")
        if not model and len(models) != 1:
            raise RepositoryError(f"name one model with server.model: server.models_dir {root} holds {known}")
        self.model = model or models[0]
        self.path = Path(root) / self.model

    def versions(self, newer_than: str | None = None) -> list[Version]:
        """See `Source.versions`; those without a manifest, whose copy is under way, are left out."""
        names = [name for name in _folders(self.path) if _newer(name, newer_than)]
        found = (self.find(name) for name in sorted(names, key=natural_key, reverse=True))
        return [version for version in found if version is not None]

    def find(self, name: str) -> Version | None:
        """See `Source.find`."""
        path = self.path / name
        if not is_plain(name) or path.is_symlink():
            return None
        identity = _identity(path)
        return None if identity is None else Version(name, path, identity)

    def refusal(self, tried: Mapping[str, str]) -> str:
        """See `Source.refusal`."""
        if not tried:
            return f"no version in {self.path}: `python -m flame_jax.export build` makes one, a folder with {MANIFEST}"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in tried.items())
        return f"no version of model {self.model} can be served: {reasons}"


class SingleArtifact:
    """One artifact's folder as the only version there is, under the name that its manifest gives it."""

    def __init__(self, path: str | Path) -> None:
        self.model = ""
        self.path = Path(path)

    def versions(self, newer_than: str | None = None) -> list[Version]:
        """See `Source.versions`; the folder is listed even when nothing is there, so that loading it says so."""
        name = self._name()
        return [Version(name, self.path, _identity(self.path) or "")] if _newer(name, newer_than) else []

    def find(self, name: str) -> Version | None:
        """See `Source.find`."""
        (version,) = self.versions()
        return version if version.name == name else None

    def refusal(self, tried: Mapping[str, str]) -> str:
        """See `Source.refusal`."""
        return " ".join(tried.values())

    def _name(self) -> str:
        try:
            return str(json.loads((self.path / MANIFEST).read_bytes())["version"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return ""


def is_plain(name: str) -> bool:
    """Whether a folder of this name may be a model or a version."""
    plain = name.isprintable() and not name.startswith(".") and not set(name) & {"/", "\\"}
    return plain and 0 < len(os.fsencode(name)) <= MAX_NAME


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts names with their digits as numbers, so that "10" comes after "9"."""
    # Split at runs of digits, text and numbers alternate: keys always compare like with like.
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if at % 2 else part for at, part in enumerate(parts)), name


def _newer(name: str, than: str | None) -> bool:
    return than is None or natural_key(name) > natural_key(than)


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if is_plain(entry.name) and entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise RepositoryError(f"model folder {path} can't be read: {error.strerror}") from error


def _identity(path: Path) -> str | None:
    """None without a manifest."""
    try:
        digest = hashlib.sha256((path / MANIFEST).read_bytes())
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            about = entry.stat(follow_symlinks=False)
            digest.update(f"{entry.name!r} {about.st_size} {about.st_mtime_ns}\n".encode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        # It is there: loading it tells the operator what is wrong.
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()
