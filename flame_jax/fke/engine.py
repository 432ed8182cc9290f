"""One model version, ready: weights on the device and one loaded executable per bucket."""

from __future__ import annotations

import copy
import logging
import pickle
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.compile import deserialize, load_kernel_runtime, lower_program, output_memory
from flame_jax.fke.device import multiprocessors, target_of
from flame_jax.fke.golden import Golden, Packer, whole
from flame_jax.fke.manifest import GOLDEN, executable_name, portable_name
from flame_jax.host_table import host_table
from flame_jax.models.kernel_choice import too_small
from flame_jax.models.serving import check_weights, served_slot, served_specs
from flame_jax.packing import Bucket
from flame_jax.pda.hot_rows import Held
from flame_jax.pjrt import bring, out_of_memory, same_hardware
from flame_jax.record import RecordLayout

WARM_RUNS = 2
"""CUDA graphs record on an executable's second run."""

log = logging.getLogger(__name__)


class Engine:
    """Runs the executables of one artifact on one device, as one client sees it: one lane.

    What is of the version is shared with its twins on other lanes: manifest, vocabularies, golden set, item table. A
    lane has executables of its own, and weights, which are shared too where it is the same hardware.

    Args:
        beside: other engines serve meanwhile: load one executable at a time, and rest between golden batches for as
            long as they take, so that calls find the device free at least half of the time.

    Attributes:
        beside: the same.
        device: where it runs.
        recompiled: buckets whose executable this CPU can't run and that were compiled here from their portable
            programs.
        golden_difference: how far the golden set's scores lay from the artifact's, once `warm` has run; see
            `Golden.apart`.

    Raises:
        ArtifactError: the artifact is damaged or was built for something else.
        jax.errors.JaxRuntimeError: the device has no room for it.
    """

    def __init__(self, artifact: Artifact, device: jax.Device, *, beside: bool = False) -> None:
        manifest = artifact.manifest
        self._artifact, self.beside = artifact, beside
        self.manifest, self._path = manifest, artifact.path
        self._missing = _check_target(artifact, device)
        self.vocabularies = artifact.vocabularies()
        host = artifact.weights()
        try:
            self._specs = served_specs(manifest.model, manifest.schema, self.vocabularies.items.rows)
            check_weights(self._specs, host)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"artifact {artifact.path}: {error}") from error
        self.slots = {b: served_slot(manifest.model, manifest.schema, manifest.layout, b) for b in manifest.buckets}
        self.item_table = artifact.item_table(self.vocabularies.items.rows)
        self.packer = Packer(
            manifest.model, manifest.schema, manifest.layout, RecordLayout(manifest.schema, host_table(self.item_table))
        )
        self.golden = _golden(artifact, self.packer.records)
        if "mosaic" in manifest.kernels.values():
            load_kernel_runtime()
        self._own = len(self._specs) - bool(manifest.model.hot_rows)
        self._settle(device, [jax.device_put(host[name], device) for name in self._specs])
        if self.recompiled:
            log.warning(
                "artifact %s: %d executables can't run on this CPU (it lacks %s) and were compiled anew",
                artifact.path,
                len(self.recompiled),
                ", ".join(self._missing) or "what the loader asked for",
            )

    def twin(self, device: jax.Device) -> Engine:
        """The same version on another device: itself on its own.

        Its executables are loaded from the artifact again. On the same hardware, as another client sees it, weights are
        shared without a copy; elsewhere it has its own. Before `hand_over_hot_rows`.

        Args:
            device: of the same client, or the same hardware as another client sees it.

        Raises:
            ArtifactError: the artifact was changed meanwhile, or was not built for this device.
            jax.errors.JaxRuntimeError: the device has no room for it.
            pjrt.Unsupported: the client does not see the weights.
        """
        if device == self.device:
            return self
        assert len(self._weights) == len(self._specs), "hot rows were handed over before all lanes were made"
        if not same_hardware(device, self.device):
            _check_target(self._artifact, device)
        twin = copy.copy(self)
        twin._settle(device, [bring(weight, device) for weight in self._weights])
        return twin

    def reloaded(self, held: Held | None = None) -> Engine:
        """The same, its executables loaded from the artifact anew, and warm: one in the place of one that fails.

        Args:
            held: see `warm`.

        Raises:
            ArtifactError: the artifact was changed meanwhile, or its golden scores are not met any more.
            jax.errors.JaxRuntimeError: the device does not work.
        """
        again = copy.copy(self)
        again._settle(self.device, self._weights)
        again.warm(held)
        return again

    @property
    def weights(self) -> list[jax.Array]:
        """In the order that executables take them, hot rows last until they are handed over."""
        return list(self._weights)

    def _settle(self, device: jax.Device, weights: list[jax.Array]) -> None:
        """Take a place: all that one lane has for itself."""
        self.device, self._weights = device, weights
        self.golden_difference = float("nan")
        self.recompiled: list[Bucket] = []
        # Reading, hashing, loading and compiling all leave the interpreter.
        with ThreadPoolExecutor(1 if self.beside else None) as pool:
            self._executables = dict(zip(self.slots, pool.map(self._executable, self.slots), strict=True))
        for bucket, executable in self._executables.items():
            taken = [(a.shape, a.dtype) for a in jax.tree.leaves(executable.in_avals)]
            given = [(spec.shape, spec.dtype) for spec in self._specs.values()]
            if taken != [*given, ((self.slots[bucket].words,), np.int32)]:
                raise ArtifactError(
                    f"artifact {self._path}: the executable of bucket {bucket} was built for other shapes"
                )

    def _executable(self, bucket: Bucket) -> jax.stages.Compiled:
        """The bucket's executable, the artifact's or one compiled here."""
        loaded = None if self._missing else self._load(bucket)
        if loaded is not None:
            return loaded
        try:
            executable = lower_program(self._artifact.read(portable_name(bucket)), self.device).compile()
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            raise ArtifactError(f"artifact {self._path}: the program of bucket {bucket}: {error}") from error
        self.recompiled.append(bucket)
        return executable

    def _load(self, bucket: Bucket) -> jax.stages.Compiled | None:
        """The bucket's executable; None when XLA's loader refuses it on this CPU."""
        payload = self._artifact.read(executable_name(bucket))
        try:
            return deserialize(payload, len(self._specs), self.device)
        except jax.errors.JaxRuntimeError as error:
            if out_of_memory(error):
                raise
            if self.manifest.target.platform == "cpu":
                log.warning("artifact %s: the executable of bucket %s is refused: %s", self._path, bucket, error)
                return None
            reason: Exception = error
        except (pickle.UnpicklingError, ValueError) as error:
            reason = error
        raise ArtifactError(
            f"artifact {self._path}: the executable of bucket {bucket} does not load here: {reason}"
        ) from reason

    @property
    def scores_memory(self) -> str:
        """Where executables leave scores: JAX's name of a kind of memory. From `pinned_host` they need no copy more."""
        kinds = {output_memory(executable) for executable in self._executables.values()}
        return ", ".join(sorted(kinds))

    def warm(self, held: Held | None = None) -> None:
        """Run every executable until it is in its steady state, and compare its scores with the golden set's.

        Args:
            held: of an item table, once its hot rows were handed over; None before.

        Raises:
            ArtifactError: they differ by more than the manifest's tolerance.
        """
        assert held is not None or len(self._weights) == len(self._specs), "hot rows were handed over"
        self.golden_difference = 0.0
        for bucket in self.slots:
            batches = self.packer.batches(self.golden, bucket)
            if not batches:
                raise ArtifactError(f"artifact {self._path}: no golden request fits bucket {bucket}")
            for number in range(max(WARM_RUNS, len(batches))):
                begun = time.monotonic()
                apart = self._replay(bucket, batches[number % len(batches)], held)
                if self.beside:
                    time.sleep(time.monotonic() - begun)
                if not apart <= self.manifest.golden_tolerance:
                    raise ArtifactError(
                        f"artifact {self._path}: in bucket {bucket} the golden requests' scores are {apart:.2g} of "
                        f"their spread off, beyond the tolerance of {self.manifest.golden_tolerance:g}"
                    )
                self.golden_difference = max(self.golden_difference, apart)

    def _replay(self, bucket: Bucket, numbers: Sequence[int], held: Held | None) -> float:
        """Largest difference of these golden requests' scores, run as one batch; see `Golden.apart`."""
        pieces = [whole(self.golden.records[i], self.packer.records) for i in numbers]
        places, hot = (None, None) if held is None else (held.places, held.rows[self.device])
        try:
            words, rows = self.packer.pack(pieces, bucket, places)
        except IndexError as error:
            raise ArtifactError(f"artifact {self._path}: a golden request has a row that is not there") from error
        scores = self.run(bucket, words, hot)
        if scores.shape != (bucket.candidates, len(self.manifest.schema.tasks)) or scores.dtype != np.float32:
            raise ArtifactError(
                f"artifact {self._path}: the executable of bucket {bucket} gives {scores.dtype}{list(scores.shape)}"
            )
        return max(self.golden.apart(scores[r], self.golden.scores[i]) for i, r in zip(numbers, rows, strict=True))

    def run(self, bucket: Bucket, words: np.ndarray, hot: jax.Array | None = None) -> np.ndarray:
        """Scores float32[C_max, tasks] of one batch, waited for; see `launch`."""
        return np.asarray(self.launch(bucket, words, hot))

    def hand_over_hot_rows(self) -> jax.Array | None:
        """[hot rows, width], the rows of an item table in host memory that the device holds at first, if it holds any.

        They are no longer the engine's: from then on `launch` must be given some.
        """
        return self._weights.pop() if self.manifest.model.hot_rows else None

    def launch(self, bucket: Bucket, words: np.ndarray, hot: jax.Array | None = None) -> jax.Array:
        """Start one batch and return at once.

        Args:
            words: int32[slot words]; must not change before the result is ready.
            hot: the rows of an item table in host memory that the slot's places are of; None: those at first.

        Returns:
            float32[C_max, tasks], the probability of every candidate row; see `scores_memory`.
        """
        weights = self._weights if hot is None else [*self._weights[: self._own], hot]
        result: jax.Array = self._executables[bucket](weights, words)
        return result


def _check_target(artifact: Artifact, device: jax.Device) -> list[str]:
    """Flags of the building machine's CPU that this one lacks. Raises ArtifactError where nothing can run."""
    built, here = artifact.manifest.target, target_of(device)
    if misfit := built.misfit(here):
        raise ArtifactError(
            f"artifact {artifact.path} {misfit}; `python -m flame_jax.export build --from {artifact.path} --platform "
            f"{here.platform} --out DIR` here compiles it for this machine"
        )
    if built.device_kind != here.device_kind:
        log.warning(
            "artifact %s was tuned for %s; on this %s it may be slower than it could be",
            artifact.path,
            built.device_kind,
            here.device_kind,
        )
    if reason := too_small(artifact.manifest.kernels, multiprocessors(device)):
        raise ArtifactError(f"artifact {artifact.path} {reason}")
    return built.missing_features(here)


def _golden(artifact: Artifact, records: RecordLayout) -> Golden:
    try:
        return Golden.from_tensors(artifact.tensors(GOLDEN), records, len(artifact.manifest.schema.tasks))
    except ValueError as error:
        raise ArtifactError(f"artifact {artifact.path} has an unreadable golden set: {error}") from error
