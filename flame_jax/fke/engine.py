"""One model version, ready: weights on the device and one loaded executable per bucket."""

from __future__ import annotations

import pickle

import jax
import numpy as np

from flame_jax.fke.artifact import Artifact, ArtifactError, executable_name
from flame_jax.fke.compile import deserialize, platform_of
from flame_jax.models.serving import check_weights, served_slot, served_specs
from flame_jax.packing import Bucket

WARM_RUNS = 3
"""CUDA graphs record on an executable's second run; the third is the first ordinary one."""


class Engine:
    """Runs the executables of one artifact on one device.

    Raises:
        ArtifactError: the artifact is damaged or was built for something else.
    """

    def __init__(self, artifact: Artifact, device: jax.Device) -> None:
        manifest = artifact.manifest
        artifact.check_target(platform_of(device), device.device_kind)
        self.manifest = manifest
        self.vocabularies = artifact.vocabularies()
        host = artifact.weights()
        try:
            specs = served_specs(manifest.model, manifest.schema, self.vocabularies.items.rows)
            check_weights(specs, host)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"artifact {artifact.path}: {error}") from error
        self.slots = {b: served_slot(manifest.model, manifest.schema, manifest.layout, b) for b in manifest.buckets}
        self.item_table = artifact.item_table(self.vocabularies.items.rows)
        self._weights = [jax.device_put(host[name], device) for name in specs]
        self._executables: dict[Bucket, jax.stages.Compiled] = {}
        for bucket in manifest.buckets:
            payload = artifact.read(executable_name(bucket))
            try:
                self._executables[bucket] = deserialize(payload, len(self._weights), device)
            except (pickle.UnpicklingError, ValueError, jax.errors.JaxRuntimeError) as error:
                raise ArtifactError(
                    f"artifact {artifact.path}: the executable of bucket {bucket} does not load here: {error}"
                ) from error
            taken = [tuple(a.shape) for a in jax.tree.leaves(self._executables[bucket].in_avals)]
            if taken != [*(tuple(spec.shape) for spec in specs.values()), (self.slots[bucket].words,)]:
                raise ArtifactError(
                    f"artifact {artifact.path}: the executable of bucket {bucket} was built for other shapes"
                )

    def warm(self) -> None:
        """Run every executable on an empty slot until it is in its steady state."""
        for bucket, slot in self.slots.items():
            words = np.zeros(slot.words, np.int32)
            for _ in range(WARM_RUNS):
                self.launch(bucket, words).block_until_ready()

    def launch(self, bucket: Bucket, words: np.ndarray) -> jax.Array:
        """Start one batch and return at once.

        Args:
            words: int32[slot words]; must not change before the result is ready.

        Returns:
            float32[C_max, tasks], the probability of every candidate row.
        """
        result: jax.Array = self._executables[bucket](self._weights, words)
        return result
