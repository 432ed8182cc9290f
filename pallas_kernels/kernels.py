"""Which implementation of each fused operation a program uses."""

from __future__ import annotations

from typing import Literal, NamedTuple

Implementation = Literal["xla", "mosaic"]


class Kernels(NamedTuple):
    """Implementation per operation: `xla`, the reference in jax.numpy, or `mosaic`, a kernel for Hopper GPUs.

    `layer_stack` holds others; its `xla` is one layer after another, on the implementations of those.
    """

    sumi_attention: Implementation = "xla"
    post_attention: Implementation = "xla"
    pre_attention: Implementation = "xla"
    gated_output: Implementation = "xla"
    layer_stack: Implementation = "xla"


REFERENCE = Kernels()
"""Runs anywhere."""
