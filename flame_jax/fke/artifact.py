"""What is served, as a folder: manifest, weights, vocabularies, one executable per bucket.

Every file but the manifest is read whole and hashed before a byte of it is parsed; an item table for host memory is
hashed, then mapped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from flame_jax.config import ModelConfig
from flame_jax.fke.buckets import Ladder, make_ladder
from flame_jax.packing import Bucket, Layout
from flame_jax.schema import FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary

FORMAT = 1
# safetensors' own reader for NumPy lacks bfloat16.
_DTYPES = {"F32": np.dtype(np.float32), "I32": np.dtype(np.int32), "BF16": np.dtype(ml_dtypes.bfloat16)}
MANIFEST, WEIGHTS, ITEM_TABLE = "manifest.json", "weights.safetensors", "item_table.npy"


class ArtifactError(Exception):
    """The artifact can't be used; the message is one clear line for the operator."""


@dataclass(frozen=True)
class Target:
    """What executables were built for; another machine must match it.

    Attributes:
        platform: JAX's platform, `cpu` or `cuda`.
        device_kind: JAX's name of the device.
        jaxlib: version.
    """

    platform: str
    device_kind: str
    jaxlib: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        kernels: implementation per op.
        files: SHA-256 per file name.
    """

    version: str
    model: ModelConfig
    schema: FeatureSchema
    layout: Layout
    buckets: Ladder
    target: Target
    matmul_precision: str
    kernels: dict[str, str]
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        about = {"format": FORMAT, "caches_history": self.model.caches_history}
        return about | asdict(self) | {"schema": self.schema.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Inverse of `to_json`. Raises ValueError, TypeError or KeyError for anything else."""
        schema, layout = FeatureSchema.from_json(data["schema"]), Layout(**data["layout"])
        return cls(
            version=str(data["version"]),
            model=ModelConfig.from_json(data["model"]),
            schema=schema,
            layout=layout,
            buckets=make_ladder(data["buckets"], schema, layout),
            target=Target(**data["target"]),
            matmul_precision=str(data["matmul_precision"]),
            kernels=dict(data["kernels"]),
            files=dict(data["files"]),
        )


def executable_name(bucket: Bucket) -> str:
    """File name of a bucket's executable."""
    return f"{bucket}.executable"


def vocabulary_name(feature: str = "") -> str:
    """File name of an id feature's vocabulary, or of the items'."""
    return f"vocabulary.{feature}.npy" if feature else "vocabulary.npy"


def jaxlib_version() -> str:
    """Version of the installed jaxlib."""
    return importlib.metadata.version("jaxlib")


def write_artifact(
    path: Path,
    *,
    version: str,
    model: ModelConfig,
    schema: FeatureSchema,
    layout: Layout,
    target: Target,
    matmul_precision: str,
    kernels: Mapping[str, str],
    weights: Mapping[str, np.ndarray],
    item_table: np.ndarray | None = None,
    vocabularies: Vocabularies,
    executables: Mapping[Bucket, bytes],
) -> Manifest:
    """Write an artifact beside `path`, then put it there in one rename; an older one there is replaced."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} exists and is no artifact: it is left alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        # Not save_file: it leaves a file that only its owner may read.
        contiguous = {name: np.ascontiguousarray(w) for name, w in weights.items()}
        (partial / WEIGHTS).write_bytes(safetensors.numpy.save(contiguous))
        if item_table is not None:
            np.save(partial / ITEM_TABLE, item_table, allow_pickle=False)
        vocabularies.items.save(partial / vocabulary_name())
        for feature, vocabulary in vocabularies.features.items():
            vocabulary.save(partial / vocabulary_name(feature))
        for bucket, payload in executables.items():
            (partial / executable_name(bucket)).write_bytes(payload)
        manifest = Manifest(
            version=version,
            model=model,
            schema=schema,
            layout=layout,
            buckets=tuple(sorted(executables)),
            target=target,
            matmul_precision=matmul_precision,
            kernels=dict(kernels),
            files={f.name: _hash(f) for f in sorted(partial.iterdir())},
        )
        (partial / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
        _replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


class Artifact:
    """An artifact on disk, its manifest read.

    Raises:
        ArtifactError: nothing there, or no manifest of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            data = json.loads((self.path / MANIFEST).read_text())
        except FileNotFoundError:
            raise ArtifactError(f"no artifact at {path}: {MANIFEST} is missing; run flame_jax.export first") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"artifact {path} has an unreadable {MANIFEST}: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError(f"artifact {path} is not of format {FORMAT}, which this program reads")
        try:
            self.manifest = Manifest.from_json(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"artifact {path} has a bad {MANIFEST}: {error}") from error

    def check_target(self, platform: str, device_kind: str) -> None:
        """Raise ArtifactError when the executables were built for another device or jaxlib."""
        ours = Target(platform, device_kind, jaxlib_version())
        for name, built in asdict(self.manifest.target).items():
            here = getattr(ours, name)
            if built != here:
                raise ArtifactError(
                    f"artifact {self.path} was built for {name} {built!r}, this process has {here!r}: export it again"
                )

    def read(self, name: str) -> bytes:
        """One file's bytes, once their hash is the manifest's. Raises ArtifactError otherwise."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise ArtifactError(f"artifact {self.path} does not list {name}")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise ArtifactError(f"artifact {self.path} lacks {name}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != expected:
            raise ArtifactError(f"artifact {self.path} is damaged: {name} does not match its hash")
        return data

    def weights(self) -> dict[str, np.ndarray]:
        """Name -> host array."""
        try:
            tensors = safetensors.deserialize(self.read(WEIGHTS))
            return {name: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in tensors}
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"artifact {self.path} has unreadable weights: {error}") from error

    def item_table(self, rows: int) -> np.ndarray | None:
        """int32[rows, words], mapped from the file, where the model keeps its item table in host memory.

        Its pages are read as requests touch them, so the file must stay as it is while it is served.
        """
        if not self.manifest.model.host_words:
            return None
        expected, path = self.manifest.files.get(ITEM_TABLE), self.path / ITEM_TABLE
        try:
            if expected is None or _hash(path) != expected:
                raise ArtifactError(f"artifact {self.path} is damaged: {ITEM_TABLE} does not match its hash")
            table: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"artifact {self.path} has an unreadable {ITEM_TABLE}: {error}") from error
        if table.dtype != np.int32 or table.shape != (rows, self.manifest.model.host_words):
            raise ArtifactError(f"artifact {self.path}: {ITEM_TABLE} is {table.dtype}{list(table.shape)}")
        return table

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
