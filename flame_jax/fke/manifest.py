"""What an artifact says of itself: `manifest.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec

from flame_jax.config import ModelConfig
from flame_jax.fke.buckets import Ladder, make_ladder
from flame_jax.fke.target import Target
from flame_jax.packing import Bucket, Layout
from flame_jax.schema import FeatureSchema

FORMAT = 3
Choices = Literal["", "device", "file", "partial", "none"]
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
WEIGHTS, ITEM_TABLE, GOLDEN = "weights.safetensors", "item_table.npy", "golden.safetensors"


def executable_name(bucket: Bucket) -> str:
    """File name of a bucket's executable."""
    return f"{bucket}.executable"


def portable_name(bucket: Bucket) -> str:
    """File name of a bucket's portable program."""
    return f"{bucket}.stablehlo"


def vocabulary_name(feature: str = "") -> str:
    """File name of an id feature's vocabulary, or of the items'."""
    return f"vocabulary.{feature}.npy" if feature else "vocabulary.npy"


@dataclass(frozen=True)
class BuiltExecutable:
    """How one bucket's executable came out.

    Attributes:
        flops: what every run of it computes, however little of its slot is used.
        temp_bytes: device memory that a run takes besides weights, slot and scores.
        compile_seconds: XLA's time.
        tuning: where the choice among XLA's GPU kernels came from: `device`, measured while compiling; `file`,
            measured before, every choice found in the given file; `partial`, some choices not found there and left to
            XLA's guess; `none`, all of them guessed. Empty on platforms where XLA does not choose so.
    """

    bucket: Bucket
    flops: int
    temp_bytes: int
    compile_seconds: float
    tuning: Choices = ""


@dataclass(frozen=True)
class FileEntry:
    """One file of the artifact: its size, and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        created: UTC, ISO 8601.
        versions: of the packages that it was made with.
        platforms: what the portable programs can be compiled for.
        kernels: implementation per op.
        executables: one per bucket.
        golden_tolerance: how far golden scores may be off (see `golden_tolerance`) before the artifact is refused.
        files: every other file by name.
    """

    version: str
    created: str
    versions: dict[str, str]
    model: ModelConfig
    schema: FeatureSchema
    layout: Layout
    target: Target
    platforms: tuple[str, ...]
    matmul_precision: Literal["default", "high", "highest"]
    kernels: dict[str, str]
    executables: tuple[BuiltExecutable, ...]
    golden_tolerance: float
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def buckets(self) -> Ladder:
        """The ladder, cheapest first."""
        return tuple(e.bucket for e in self.executables)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        about = {"format": FORMAT, "caches_history": self.model.caches_history}
        return about | asdict(self) | {"schema": self.schema.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Inverse of `to_json`, every type checked. Raises ValueError for anything else."""
        manifest = msgspec.convert(data, cls)
        buckets, schema = manifest.buckets, manifest.schema
        if make_ladder(buckets, schema, manifest.layout) != buckets:
            raise ValueError("its executables are not sorted by bucket")
        for what, name in (("version", manifest.version), ("model name", manifest.model.name)):
            if not name or not name.isprintable():
                raise ValueError(f"its {what} is {name!r}")
        if not 0 < manifest.golden_tolerance <= golden_tolerance(manifest.model, manifest.matmul_precision):
            raise ValueError(f"golden_tolerance is {manifest.golden_tolerance!r}")
        if set(manifest.files) != (expected := manifest.file_names()):
            odd = sorted(set(manifest.files) ^ expected)
            raise ValueError(f"its files are not those of such a model: {', '.join(map(repr, odd[:3]))}")
        return manifest

    def file_names(self) -> set[str]:
        """Every file but the manifest and its signature."""
        names = {WEIGHTS, GOLDEN, vocabulary_name(), *map(vocabulary_name, self.schema.id_features)}
        names |= {name(bucket) for bucket in self.buckets for name in (executable_name, portable_name)}
        return names | {ITEM_TABLE} if self.model.host_words else names


def golden_tolerance(model: ModelConfig, precision: str) -> float:
    """How far a golden request's logits may lie from the recorded ones, in units of how far all of them spread.

    Two platforms round differently, and in bfloat16 by much of a small model's spread.
    """
    if model.dtype == "bfloat16":
        return 0.25
    return 0.005 if precision == "highest" else 0.05
