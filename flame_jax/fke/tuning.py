"""XLA's choices among GPU kernels, measured on a device once and carried to builds that have none.

XLA keys a choice by the instruction it is for, so a changed model, bucket or precision needs tuning again.

`xla_gpu_exclude_nondeterministic_ops` is not used: it makes XLA choose without measuring, and slower kernels. Whether
placements in a slot change a bit of a score is looked at for each artifact by `export verify`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import jax

from flame_jax.fke.compile import compiled_anew, lower_program
from flame_jax.fke.device import target_of
from flame_jax.fke.manifest import Choices
from flame_jax.fke.target import Target

FORMAT = 1


class TuningError(ValueError):
    """A tuning file can't be used; the message is one clear line."""


@dataclass(frozen=True)
class Tuning:
    """Choices for one kind of device.

    Attributes:
        target: what they were measured with.
        results: XLA's autotuning results in text form.
    """

    target: Target
    results: str

    @classmethod
    def measure(cls, programs: Iterable[bytes], device: jax.Device) -> Self:
        """Compile portable programs on a device that is there, and keep what XLA measured.

        Raises:
            TuningError: it measured nothing.
        """
        with tempfile.TemporaryDirectory() as folder, compiled_anew():
            file = Path(folder) / "results.txtpb"
            for program in programs:
                # The file holds what this process has measured so far, so the last one holds all of it.
                options = {"xla_gpu_dump_autotune_results_to": str(file)}
                lower_program(program, device).compile(compiler_options=options)
            if not file.exists():
                raise TuningError(f"XLA measured nothing on {device.device_kind}; is XLA_FLAGS keeping it from that?")
            return cls(target_of(device), file.read_text())

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.write_text(json.dumps({"format": FORMAT, "target": asdict(self.target), "results": self.results}) + "\n")

    @classmethod
    def load(cls, path: Path, target: Target) -> Self:
        """Read a file for a build for `target`.

        Raises:
            TuningError: there is none, it is damaged, or it is of another device or jaxlib.
        """
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            measured = Target(**data["target"] | {"cpu_features": tuple(data["target"]["cpu_features"])})
            tuning = cls(measured, str(data["results"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TuningError(f"tuning file {path} can't be read: {error}") from error
        for name in ("device_kind", "jaxlib", "plugin"):
            ours, theirs = getattr(target, name), getattr(tuning.target, name)
            if ours != theirs:
                raise TuningError(f"tuning file {path} was measured with {name} {theirs!r}, the build is for {ours!r}")
        return tuning


def compile_tuned(
    lowered: jax.stages.Lowered, target: Target, *, present: bool, file: Path | None
) -> tuple[jax.stages.Compiled, Choices]:
    """Compile, with choices from a file where one is given.

    Args:
        present: whether the device is in this machine, so that XLA can measure.
        file: XLA's results as text, see `results_file`.

    Returns:
        The executable, and `BuiltExecutable.tuning`.
    """
    if target.platform != "cuda":
        return lowered.compile(), ""
    if file is None:
        return lowered.compile(), "device" if present else "none"
    given = {"xla_gpu_load_autotune_results_from": str(file)}
    try:
        return lowered.compile(compiler_options=given | {"xla_gpu_require_complete_aot_autotune_results": True}), "file"
    except jax.errors.JaxRuntimeError as error:
        if re.search(r"configs for: \d+ out of \d+", str(error)) is None:
            raise
    return lowered.compile(compiler_options=given), "device" if present else "partial"


def results_file(tuning: Tuning | None, folder: Path) -> Path | None:
    """Write a tuning's results as XLA reads them, once per process and build."""
    if tuning is None:
        return None
    path = folder / "tuned.txtpb"
    path.write_text(tuning.results)
    return path
