"""What is served, as a folder: manifest, weights, vocabularies, a golden set, per bucket a portable program and an
executable.

Nothing is parsed before it is proven: the manifest by its signature where keys are trusted, every other file by the
manifest's hash. The bytes that were hashed are those that are parsed; only an item table for host memory is hashed and
then mapped, so that it must not be changed while it is served. Files are opened below the folder that was
opened first, so that another folder moved into its place, or a link out of it, is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import weakref
from io import BufferedReader
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from flame_jax.fke.manifest import (
    FORMAT,
    ITEM_TABLE,
    MANIFEST,
    SIGNATURE,
    WEIGHTS,
    Manifest,
    executable_name,
    portable_name,
    vocabulary_name,
)
from flame_jax.fke.signing import TrustedKeys
from flame_jax.packing import Bucket
from flame_jax.vocabulary import Vocabularies, Vocabulary

MAX_MANIFEST = 64 << 20
# safetensors' own reader for NumPy lacks bfloat16.
_DTYPES = {"F32": np.dtype(np.float32), "I32": np.dtype(np.int32), "BF16": np.dtype(ml_dtypes.bfloat16)}


class ArtifactError(Exception):
    """The artifact can't be used; the message is one clear line for the operator."""


class Artifact:
    """An artifact on disk, its manifest read.

    Args:
        path: the folder.
        trusted: where given, the manifest must be signed by the holder of one of these keys.

    Raises:
        ArtifactError: nothing there, no manifest of this format, or none that may be trusted.
    """

    def __init__(self, path: str | Path, trusted: TrustedKeys | None = None) -> None:
        self.path = Path(path)
        try:
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(
                f"no artifact at {path}: {error.strerror}; `python -m flame_jax.export build` makes one"
            ) from error
        weakref.finalize(self, os.close, self._folder)
        text = self._manifest_bytes()
        if trusted is not None:
            self._check_signature(text, trusted)
        self.digest = hashlib.sha256(text).hexdigest()
        """SHA-256 of the manifest: two artifacts of one digest are the same."""
        self.manifest = self._parse(text)

    def _manifest_bytes(self) -> bytes:
        try:
            with self._open(MANIFEST) as file:
                text = file.read(MAX_MANIFEST + 1)
        except FileNotFoundError:
            raise ArtifactError(
                f"no artifact at {self.path}: {MANIFEST} is missing; `python -m flame_jax.export build` makes one"
            ) from None
        except OSError as error:
            raise ArtifactError(f"artifact {self.path} has an unreadable {MANIFEST}: {error.strerror}") from error
        if len(text) > MAX_MANIFEST:
            raise ArtifactError(f"artifact {self.path} has an unreadable {MANIFEST}: over {MAX_MANIFEST} bytes")
        return text

    def _check_signature(self, text: bytes, trusted: TrustedKeys) -> None:
        try:
            with self._open(SIGNATURE) as file:
                signature = file.read(1024)
        except OSError:
            raise ArtifactError(
                f"artifact {self.path} is not signed, and trusted keys are set; "
                "`python -m flame_jax.export sign` signs it"
            ) from None
        if trusted.signer(text, signature) is None:
            raise ArtifactError(f"artifact {self.path} is not signed by the holder of a trusted key")

    def _parse(self, text: bytes) -> Manifest:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"artifact {self.path} has an unreadable {MANIFEST}: {error}") from error
        found = data.get("format") if isinstance(data, dict) else None
        if type(found) is not int or found != FORMAT:
            raise ArtifactError(
                f"artifact {self.path} has format {found!r:.40}, this program reads format {FORMAT}: build it again "
                "with `python -m flame_jax.export build`"
            )
        try:
            return Manifest.from_json(data)
        except (ValueError, OverflowError) as error:
            raise ArtifactError(f"artifact {self.path} has a bad {MANIFEST}: {error}") from error

    @property
    def signed(self) -> bool:
        """Whether there is a signature; whose is told by `trusted` alone."""
        try:
            self._open(SIGNATURE).close()
        except OSError:
            return False
        return True

    def _open(self, name: str) -> BufferedReader:
        """Open a plain file of the folder; raises OSError for a link or anything else that is none."""
        # Not blocking: a named pipe would wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(name, flags, dir_fd=self._folder), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(0, "it is no plain file")
        return file

    def _open_listed(self, name: str) -> BufferedReader:
        """Open a file whose size is the one that the manifest says."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise ArtifactError(f"artifact {self.path} does not list {name}")
        try:
            file = self._open(name)
        except OSError as error:
            raise ArtifactError(f"artifact {self.path} lacks {name}: {error.strerror}") from error
        if (size := os.fstat(file.fileno()).st_size) != expected.bytes:
            file.close()
            raise ArtifactError(f"artifact {self.path} is damaged: {name} has {size} bytes, not {expected.bytes}")
        return file

    def read(self, name: str) -> bytes:
        """One file's bytes, once their hash is the manifest's. Raises ArtifactError otherwise."""
        with self._open_listed(name) as file:
            try:
                data = file.read()
            except OSError as error:
                raise ArtifactError(f"artifact {self.path} has an unreadable {name}: {error.strerror}") from error
            except MemoryError:
                raise ArtifactError(f"artifact {self.path}: {name} is larger than this machine's memory") from None
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise ArtifactError(f"artifact {self.path} is damaged: {name} does not match its hash")
        return data

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Name -> host array of a safetensors file."""
        try:
            tensors = safetensors.deserialize(self.read(name))
            return {key: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"]) for key, t in tensors}
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"artifact {self.path} has an unreadable {name}: {error}") from error

    def weights(self) -> dict[str, np.ndarray]:
        """Name -> host array."""
        return self.tensors(WEIGHTS)

    def item_table(self, rows: int) -> np.ndarray | None:
        """int32[rows, words], mapped from the file, where the model keeps its item table in host memory.

        Its pages are read as requests touch them, so the file must stay as it is while it is served; it may be
        deleted.
        """
        words = self.manifest.model.host_words
        if not words:
            return None
        with self._open_listed(ITEM_TABLE) as file:
            self._check_hash(file, ITEM_TABLE)
            file.seek(0)
            try:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            except Exception as error:  # NumPy raises half a dozen kinds on damaged bytes
                raise ArtifactError(f"artifact {self.path} has an unreadable {ITEM_TABLE}") from error
            if dtype != np.int32 or shape != (rows, words) or fortran:
                raise ArtifactError(f"artifact {self.path}: {ITEM_TABLE} is {dtype}{list(shape)}")
            if os.fstat(file.fileno()).st_size != file.tell() + 4 * rows * words:
                raise ArtifactError(f"artifact {self.path} has an unreadable {ITEM_TABLE}: it is cut off")
            return np.memmap(file, np.int32, "r", file.tell(), shape)

    def check(self, name: str) -> None:
        """Compare one file with its hash, without holding it in memory. Raises ArtifactError."""
        with self._open_listed(name) as file:
            self._check_hash(file, name)

    def _check_hash(self, file: BufferedReader, name: str) -> None:
        if hashlib.file_digest(file, "sha256").hexdigest() != self.manifest.files[name].sha256:
            raise ArtifactError(f"artifact {self.path} is damaged: {name} does not match its hash")

    def vocabularies(self) -> Vocabularies:
        """The vocabularies of items and of every id feature."""
        try:
            vocabularies = Vocabularies(
                Vocabulary.from_bytes(self.read(vocabulary_name())),
                {
                    name: Vocabulary.from_bytes(self.read(vocabulary_name(name)))
                    for name in self.manifest.schema.id_features
                },
            )
            vocabularies.check(self.manifest.schema)
        except ValueError as error:
            raise ArtifactError(f"artifact {self.path} has an unreadable vocabulary: {error}") from error
        return vocabularies

    def programs(self) -> dict[Bucket, bytes]:
        """Every bucket's portable program."""
        return {bucket: self.read(portable_name(bucket)) for bucket in self.manifest.buckets}

    def data(self) -> dict[str, bytes | np.ndarray]:
        """Every file but programs and executables, by name, as `write_artifact` takes them."""
        made = {name(bucket) for bucket in self.manifest.buckets for name in (executable_name, portable_name)}
        names = self.manifest.file_names() - made - {ITEM_TABLE}
        files: dict[str, bytes | np.ndarray] = {name: self.read(name) for name in sorted(names)}
        if (table := self.item_table(self.vocabularies().items.rows)) is not None:
            files[ITEM_TABLE] = table
        return files
