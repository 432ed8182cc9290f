"""What an artifact says of itself: `manifest.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flame_jax.config import ModelConfig
from flame_jax.fke.buckets import Ladder, make_ladder
from flame_jax.fke.target import Target
from flame_jax.packing import Bucket, Layout
from flame_jax.schema import FeatureSchema

FORMAT = 2
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
    tuning: str = ""


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
        golden_tolerance: how far a probability may lie from the golden set's before the artifact is refused.
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
    matmul_precision: str
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
        """Inverse of `to_json`. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
        schema, layout = FeatureSchema.from_json(data["schema"]), Layout(**data["layout"])
        executables = tuple(_executable(e) for e in data["executables"])
        if make_ladder([e.bucket for e in executables], schema, layout) != tuple(e.bucket for e in executables):
            raise ValueError("its executables are not sorted by bucket")
        target = data["target"]
        return cls(
            version=str(data["version"]),
            created=str(data["created"]),
            versions=dict(data["versions"]),
            model=ModelConfig.from_json(data["model"]),
            schema=schema,
            layout=layout,
            target=Target(**target | {"cpu_features": tuple(target["cpu_features"])}),
            platforms=tuple(data["platforms"]),
            matmul_precision=str(data["matmul_precision"]),
            kernels=dict(data["kernels"]),
            executables=executables,
            golden_tolerance=_tolerance(data["golden_tolerance"]),
            files={name: _entry(name, entry) for name, entry in data["files"].items()},
        )


def _executable(data: dict[str, Any]) -> BuiltExecutable:
    return BuiltExecutable(**data | {"bucket": Bucket(*data["bucket"])})


def _tolerance(value: Any) -> float:
    if not 0 < float(value) < 1:
        raise ValueError(f"golden_tolerance is {value!r}")
    return float(value)


def _entry(name: str, data: dict[str, Any]) -> FileEntry:
    entry = FileEntry(**data)
    if not name or "/" in name or "\0" in name or name in (".", "..", MANIFEST, SIGNATURE):
        raise ValueError(f"it lists a file {name!r}")
    if type(entry.bytes) is not int or type(entry.sha256) is not str:
        raise TypeError(f"its entry of {name} is malformed")
    return entry
