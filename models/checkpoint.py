"""Checkpoints: everything needed to export a model, in one Orbax folder readable without this code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from orbax.checkpoint import v1 as ocp

from flame_jax.config import ModelConfig
from flame_jax.schema import FeatureSchema
from flame_jax.vocabulary import Vocabularies, Vocabulary

KEEP = 2
_SERVING_ONLY = {("model", "table_dtype"), ("model", "item_table"), ("model", "hot_rows")}


class CheckpointError(Exception):
    """The checkpoint can't be used; the message is one clear line for the operator."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's description and weights at one step.

    Attributes:
        step: training step (epoch) it was saved at.
        vocabularies: of items and id features.
        weights: name -> array (docs/models.md), float32 but for the columns of item features.
        optimizer: leaves of the optimiser's state, in its own order.
        training: what decides which events it was trained on, for resuming.
    """

    step: int
    model: ModelConfig
    schema: FeatureSchema
    vocabularies: Vocabularies
    weights: Mapping[str, np.ndarray]
    optimizer: Sequence[np.ndarray]
    training: Mapping[str, Any] = field(default_factory=dict)

    def check_fits(self, model: ModelConfig, schema: FeatureSchema, path: str | Path) -> None:
        """Raise CheckpointError, naming what differs, unless it was made for this configuration.

        Where and in which type tables are served is decided at export, not when a model is trained.
        """
        theirs = {"model": asdict(self.model), "schema": self.schema.to_json()}
        for section, ours in (("model", asdict(model)), ("schema", schema.to_json())):
            for name, value in ours.items():
                if theirs[section][name] != value and (section, name) not in _SERVING_ONLY:
                    raise CheckpointError(
                        f"checkpoint {path} does not fit the configuration: {section}.{name} is "
                        f"{theirs[section][name]!r} there and {value!r} here"
                    )


class CheckpointFolder:
    """Saves and loads checkpoints of one training run; the newest two are kept."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"checkpoint {path} is not a folder")
        self._orbax = ocp.training.Checkpointer(
            self.path.absolute(), preservation_policy=ocp.training.preservation_policies.LatestN(KEEP)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._orbax.close()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one step, whole or not at all."""
        self._orbax.save(
            checkpoint.step,
            {
                "weights": dict(checkpoint.weights),
                "optimizer": list(checkpoint.optimizer),
                "vocabulary": checkpoint.vocabularies.items.keys,
                # Orbax can't save an array of no elements: an empty vocabulary is left out.
                "feature_vocabularies": {n: v.keys for n, v in checkpoint.vocabularies.features.items() if v.keys.size},
            },
            custom_metadata={
                "model": asdict(checkpoint.model),
                "schema": checkpoint.schema.to_json(),
                "training": dict(checkpoint.training),
            },
        )

    def latest(self) -> Checkpoint | None:
        """The newest step, None when there is none. Raises CheckpointError for one that can't be read."""
        newest = self._orbax.latest
        if newest is None:
            return None
        try:
            tree: Any = self._orbax.load(newest)
            about: Any = self._orbax.metadata(newest).custom_metadata
            schema = FeatureSchema.from_json(about["schema"])
            saved, none = tree.get("feature_vocabularies") or {}, np.empty(0, np.int64)
            features = {name: Vocabulary(saved.get(name, none)) for name in schema.id_features}
            vocabularies = Vocabularies(Vocabulary(tree["vocabulary"]), features)
            vocabularies.check(schema)
            return Checkpoint(
                step=newest.step,
                model=ModelConfig.from_json(about["model"]),
                schema=schema,
                vocabularies=vocabularies,
                weights=tree["weights"],
                optimizer=tree["optimizer"],
                training=about["training"],
            )
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"checkpoint {self.path} can't be read: {error}") from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The newest checkpoint in a folder. Raises CheckpointError when there is none."""
    if not Path(path).is_dir():
        raise CheckpointError(f"no checkpoint at {path}: run flame_jax.train or flame_jax.convert first")
    with CheckpointFolder(path) as folder:
        checkpoint = folder.latest()
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint at {path}: run flame_jax.train first")
    return checkpoint
