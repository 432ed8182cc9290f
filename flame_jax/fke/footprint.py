"""What executables take beside their weights: measured on a few buckets by compiling them, a line for the others."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from flame_jax.config import ModelConfig
from flame_jax.fke.compile import compiled_anew, lower_program, portable_program, serialize
from flame_jax.packing import Bucket, Layout
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.schema import FeatureSchema


class Line(NamedTuple):
    """A quantity over a bucket's token rows, never negative and never falling."""

    constant: float
    per_row: float

    @classmethod
    def through(cls, rows: Sequence[int], values: Sequence[float]) -> Self:
        """Least squares; the mean where the values fall, or where all rows are the same."""
        if len(set(rows)) > 1:
            per_row, constant = np.polyfit(rows, values, 1).tolist()
            if per_row > 0:
                return cls(constant, per_row)
        return cls(float(np.mean(values)), 0.0)

    def at(self, bucket: Bucket) -> float:
        """Its value for a bucket."""
        return max(0.0, self.constant + self.per_row * bucket.tokens)


class Footprint(NamedTuple):
    """What executables of one model take on one device.

    Attributes:
        device_kind: JAX's name of the device they were compiled for.
        vocabulary: item rows they were compiled with.
        buckets: those that were compiled.
        temporaries: bytes of device memory while a batch runs.
        code: bytes of an executable.
        seconds: of building it.
    """

    device_kind: str
    vocabulary: int
    buckets: tuple[Bucket, ...]
    temporaries: Line
    code: Line
    seconds: Line


def measure(
    model: ModelConfig,
    schema: FeatureSchema,
    layout: Layout,
    buckets: Iterable[Bucket],
    vocabulary: int,
    *,
    precision: str,
    device: jax.Device,
    kernels: Kernels = REFERENCE,
) -> Footprint:
    """Compile buckets for a device, without the compilation cache, and measure.

    Args:
        vocabulary: item rows; no weights are needed.

    Raises:
        ValueError: the model can't read the schema.
        jax.errors.JaxRuntimeError: XLA can't compile a bucket.
    """
    measured = sorted(set(buckets))
    temporaries: list[int] = []
    code: list[int] = []
    seconds: list[float] = []
    with compiled_anew():
        jax.jit(lambda: 0).lower().compile()  # the backend starts with the first compilation
        for bucket in measured:
            started = time.perf_counter()
            program = portable_program(model, schema, layout, bucket, vocabulary, precision=precision, kernels=kernels)
            compiled = lower_program(program, device).compile()
            payload = serialize(compiled)
            seconds.append(time.perf_counter() - started)
            memory: Any = compiled.memory_analysis()
            temporaries.append(memory.temp_size_in_bytes)
            # XLA's CPU compiler says 0 bytes of code; the rest of what is serialised is small.
            code.append(max(memory.generated_code_size_in_bytes, len(payload)))
    rows = [bucket.tokens for bucket in measured]
    lines = [Line.through(rows, values) for values in (temporaries, code, seconds)]
    return Footprint(device.device_kind, vocabulary, tuple(measured), *lines)
