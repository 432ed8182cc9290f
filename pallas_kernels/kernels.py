"""Which implementation of each fused operation a program uses."""

from __future__ import annotations

from typing import Literal, NamedTuple

Implementation = Literal["xla", "mosaic"]


class Kernels(NamedTuple):
    """Implementation per operation: `xla`, the reference in jax.numpy, or `mosaic`, a kernel for Hopper GPUs."""

    sumi_attention: Implementation = "xla"
    post_attention: Implementation = "xla"
    pre_attention: Implementation = "xla"
    gated_output: Implementation = "xla"


REFERENCE = Kernels()
"""Runs anywhere."""
