"""Which implementation each of a model's fused operations gets on a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from flame_jax.config import ModelConfig
from flame_jax.packing import Layout
from flame_jax.pallas_kernels.kernels import REFERENCE, Implementation, Kernels

HOPPER = "9.0"
"""The compute capability that the kernels are written for."""

_ROW_WISE = {"climber": ("post_attention",), "hstu": ("pre_attention", "gated_output")}
_WHOLE = {"climber": "layer_stack"}
"""Operations made of the others: no model lacks anything where there is no kernel of these."""

log = logging.getLogger(__name__)


def choose_kernels(
    model: ModelConfig,
    layout: Layout,
    capability: str,
    wanted: Literal["auto", "xla", "mosaic"] = "auto",
    *,
    multiprocessors: int,
) -> Kernels:
    """Fused kernels where the device and the model allow them, the reference elsewhere.

    Args:
        capability: compute capability of the device; empty for none.
        multiprocessors: of the device.
        wanted: `xla` takes the reference everywhere; `mosaic` accepts nothing else.

    Raises:
        ValueError: `wanted` is `mosaic`, and an operation of the model has no such kernel there.
    """
    if wanted == "xla" or (wanted == "auto" and not capability):
        return REFERENCE
    if capability != HOPPER:
        where = f"compute capability {capability}" if capability else "no GPU"
        misfits = dict.fromkeys(operations(model), f"the kernels are for compute capability {HOPPER}, this is {where}")
    else:
        misfits = _misfits(model, layout)
    for operation, reason in misfits.items():
        if reason and wanted == "mosaic":
            raise ValueError(f"export.kernels=mosaic: {operation}: {reason}")
        if reason:
            log.warning("model %s: %s is not fused: %s", model.name, operation, reason)
    fused: dict[str, Implementation] = {operation: "mosaic" for operation, reason in misfits.items() if not reason}
    if len(fused) == len(misfits) and _has_whole(model, layout, multiprocessors):
        fused[_WHOLE[model.architecture]] = "mosaic"
    return REFERENCE._replace(**fused)


def operations(model: ModelConfig) -> tuple[str, ...]:
    """The fused operations that a model has."""
    return ("sumi_attention", *_ROW_WISE.get(model.architecture, ()))


def in_use(model: ModelConfig, kernels: Kernels) -> dict[str, str]:
    """Implementation per operation of this model; of one that others make up only if there is a kernel."""
    whole = _WHOLE.get(model.architecture)
    more = (whole,) if whole and getattr(kernels, whole) != "xla" else ()
    return {operation: getattr(kernels, operation) for operation in (*operations(model), *more)}


def too_small(kernels: Mapping[str, str], multiprocessors: int) -> str:
    """Why thread blocks of these kernels might wait forever on a GPU with so many multiprocessors; empty if not so."""
    if kernels.get("layer_stack", "xla") == "xla":
        return ""
    from flame_jax.pallas_kernels.hopper import MULTIPROCESSORS

    if multiprocessors >= MULTIPROCESSORS:
        return ""
    return f"has a kernel for {MULTIPROCESSORS} multiprocessors at once, this GPU has {multiprocessors}: build it here"


def most_at_once(kernels: Mapping[str, str]) -> int | None:
    """Executables with these kernels that may run on one GPU at the same time, on several streams; None: any number."""
    if kernels.get("layer_stack", "xla") == "xla":
        return None
    from flame_jax.pallas_kernels.layer_stack.mosaic import AT_ONCE

    return AT_ONCE


def _has_whole(model: ModelConfig, layout: Layout, multiprocessors: int) -> bool:
    if model.architecture not in _WHOLE or model.head_dim * model.heads != model.width:
        return False
    from flame_jax.pallas_kernels.layer_stack import mosaic

    dtype = jnp.dtype(model.dtype)
    misfit = mosaic.misfit(dtype, model.width, model.heads, model.ffn, layout.align)
    return not misfit and not too_small({"layer_stack": "mosaic"}, multiprocessors)


def _misfits(model: ModelConfig, layout: Layout) -> dict[str, str]:
    # Where no kernel is asked for, Pallas need not be imported.
    from flame_jax.models.hstu_layer import column_sizes
    from flame_jax.pallas_kernels.gated_output import mosaic as gated_output
    from flame_jax.pallas_kernels.post_attention import mosaic as post_attention
    from flame_jax.pallas_kernels.pre_attention import mosaic as pre_attention
    from flame_jax.pallas_kernels.sumi_attention import mosaic as sumi_attention
    from flame_jax.pallas_kernels.sumi_attention.types import TableBias

    dtype, hstu = jnp.dtype(model.dtype), model.architecture == "hstu"
    values = model.hstu.value_dim if hstu else model.head_dim
    research = hstu and model.hstu.variant == "research"
    width, align, sizes = model.width, layout.align, column_sizes(model)
    inner = model.heads * model.head_dim
    misfits = {
        "sumi_attention": sumi_attention.misfit(dtype, model.head_dim, values, align, TableBias if research else None),
        "post_attention": post_attention.misfit(dtype, width, inner, model.ffn, align),
        "pre_attention": pre_attention.misfit(dtype, width, sizes, align, plain=research),
        "gated_output": gated_output.misfit(dtype, width, sizes[0], align, plain=research),
    }
    return {operation: misfits[operation] for operation in operations(model)}
