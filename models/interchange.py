"""A checkpoint as one safetensors file, readable by anybody's tools and bit-equal both ways."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from flame_jax.config import ModelConfig
from flame_jax.models.checkpoint import Checkpoint, CheckpointError
from flame_jax.models.tensors import first_line
from flame_jax.schema import FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary

FORMAT = 1
SUFFIX = ".safetensors"
METADATA = "flame_jax"
"""Key of the header's metadata that describes the checkpoint, as JSON."""
VOCABULARY = "vocabulary"
FEATURE_VOCABULARY = "vocabulary/"
OPTIMIZER = "optimizer/"


def save_safetensors(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint as one file, whole or not at all; a file there is replaced.

    Weights lie under their own names (docs/models.md), the item ids as `vocabulary` (int64, ascending), an id
    feature's keys as `vocabulary/<group>.<name>`, the optimiser's leaves as `optimizer/00000` and so on.

    Raises:
        CheckpointError: a weight has one of those other names, or the file can't be written.
    """
    path = Path(path)
    tensors = dict(checkpoint.weights)
    reserved = (FEATURE_VOCABULARY, OPTIMIZER)
    if taken := [name for name in tensors if name == VOCABULARY or name.startswith(reserved)]:
        raise CheckpointError(f"weights can't be stored under the names {', '.join(taken)}")
    tensors[VOCABULARY] = checkpoint.vocabularies.items.keys
    tensors |= {FEATURE_VOCABULARY + name: v.keys for name, v in checkpoint.vocabularies.features.items()}
    tensors |= {f"{OPTIMIZER}{number:05d}": leaf for number, leaf in enumerate(checkpoint.optimizer)}
    about = {
        "format": FORMAT,
        "step": checkpoint.step,
        "model": asdict(checkpoint.model),
        "schema": checkpoint.schema.to_json(),
        "training": dict(checkpoint.training),
    }
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # The format has no strides; order="C" copies what needs it and, unlike ascontiguousarray, leaves scalars alone.
        contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        # Not save_file: it leaves a file that only its owner may read.
        partial.write_bytes(safetensors.numpy.save(contiguous, metadata={METADATA: json.dumps(about)}))
        _sync(partial)
        os.rename(partial, path)
        _sync(path.parent)
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} can't be written: {first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            partial.unlink()


def is_checkpoint_file(path: str | Path) -> bool:
    """Whether a file is safetensors and describes itself as a checkpoint of ours."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return METADATA in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def load_safetensors(path: str | Path) -> Checkpoint:
    """Read what `save_safetensors` wrote, to the bit. Raises CheckpointError for anything else."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = _description((file.metadata() or {}).get(METADATA), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        schema = FeatureSchema.from_json(about["schema"])
        return Checkpoint(
            step=about["step"],
            model=ModelConfig.from_json(about["model"]),
            schema=schema,
            vocabularies=_vocabularies(tensors, schema),
            optimizer=_optimizer(tensors),
            weights=tensors,  # what the two above have left
            training=about["training"],
        )
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} can't be read: {first_line(error)}") from error


def _description(text: str | None, path: str | Path) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(f"{path} is no checkpoint: its header has no {METADATA} metadata")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {METADATA} metadata is not JSON") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} is not of format {FORMAT}, which this program reads")
    step, training = about.get("step"), about.get("training")
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}")
    if not isinstance(training, dict):
        raise ValueError("its training is not a mapping")
    return about


def _vocabularies(tensors: dict[str, np.ndarray], schema: FeatureSchema) -> Vocabularies:
    """Take the ids out of the tensors."""
    if VOCABULARY not in tensors:
        raise ValueError(f"it has no {VOCABULARY}")
    named = [name for name in tensors if name.startswith(FEATURE_VOCABULARY)]
    features = {name.removeprefix(FEATURE_VOCABULARY): _ascending(name, tensors.pop(name)) for name in named}
    vocabularies = Vocabularies(_ascending(VOCABULARY, tensors.pop(VOCABULARY)), features)
    vocabularies.check(schema)
    return vocabularies


def _ascending(name: str, ids: np.ndarray) -> Vocabulary:
    # Sorting them here would leave the rows of the table behind.
    if ids.dtype != np.int64 or ids.ndim != 1 or (np.diff(ids) <= 0).any():
        raise ValueError(f"its {name} does not hold int64 ids in ascending order")
    return Vocabulary(ids)


def _optimizer(tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Take the optimiser's leaves out of the tensors, in order."""
    count = sum(name.startswith(OPTIMIZER) for name in tensors)
    names = [f"{OPTIMIZER}{number:05d}" for number in range(count)]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"it lacks {missing[0]}")
    return [tensors.pop(name) for name in names]


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
