"""Models on fused kernels (interpreted) against the same models on the reference, and which kernels they get."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flame_jax.config import HeadConfig, HstuConfig, ModelConfig
from flame_jax.models.kernel_choice import choose_kernels, in_use, too_small
from flame_jax.models.registry import make_ranker
from flame_jax.packing import Bucket, Layout
from flame_jax.pallas_kernels.gated_output import mosaic as gated_output
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.layer_stack import mosaic as layer_stack
from flame_jax.pallas_kernels.post_attention import mosaic as post_attention
from flame_jax.pallas_kernels.pre_attention import mosaic as pre_attention
from flame_jax.pallas_kernels.sumi_attention import mosaic as sumi_attention
from flame_jax.schema import Block, FeatureSchema
from tests.packed import pack, random_request

LAYOUT, BUCKET, ROWS = Layout(align=64, max_requests=4), Bucket(192, 128), 20
CLIMBER = ModelConfig(
    width=64,
    layers=2,
    heads=2,
    head_dim=32,
    ffn=128,
    dtype="bfloat16",
    head=HeadConfig(2, 8, 4),
    architecture="climber",
)
HSTU = replace(CLIMBER, architecture="hstu", hstu=HstuConfig(variant="dlrm_v3", value_dim=64))
TWO_BLOCKS = FeatureSchema(scenarios=("a", "b"), blocks=(Block("x"), Block("y")), block_length=64)
ONE_BLOCK = replace(TWO_BLOCKS, blocks=(Block("x"),))
on_h100 = partial(choose_kernels, multiprocessors=132)
FUSED = Kernels("mosaic", "mosaic", "mosaic", "mosaic")
WHOLE = replace(CLIMBER, width=128, head_dim=64, layers=1)
FUSED_CLIMBER = REFERENCE._replace(sumi_attention="mosaic", post_attention="mosaic")
FUSED_HSTU = FUSED._replace(post_attention="xla")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sumi_attention, post_attention, pre_attention, gated_output, layer_stack):
        name = module.__name__.split(".")[-2]
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("config", "schema", "lengths"),
    [
        (CLIMBER, TWO_BLOCKS, [[60, 20], [0, 0]]),
        (WHOLE, TWO_BLOCKS, [[60, 20], [0, 0]]),
        (HSTU, ONE_BLOCK, [[60], [0]]),
    ],
    ids=["climber", "layers in one kernel", "hstu"],
)
def test_fused_scores_are_the_references(config: ModelConfig, schema: FeatureSchema, lengths: list[list[int]]) -> None:
    chosen = on_h100(config, LAYOUT, "9.0")
    random = np.random.default_rng(0)
    model = make_ranker(config, schema, ROWS, rngs=nnx.Rngs(0))
    state = jax.tree.map(lambda w: w + 0.1 * random.normal(size=w.shape).astype(w.dtype), nnx.state(model, nnx.Param))
    nnx.update(model, state)
    requests = [random_request(schema, random, lengths=n, candidates=9, rows=ROWS) for n in lengths]
    packed = pack(schema, LAYOUT, BUCKET, requests, dirt=random)
    fields = {name: jnp.asarray(field) for name, field in packed.fields.items()}
    plain, fused = (
        np.asarray(jax.jit(partial(model, layout=LAYOUT, candidates=BUCKET.candidates, kernels=kernels))(fields))
        for kernels in (REFERENCE, chosen)
    )
    assert np.isfinite(fused).all()
    first = BUCKET.tokens - BUCKET.candidates
    rows = np.concatenate([np.arange(p.candidate_start, p.candidate_start + 9) - first for p in packed.places])
    spread = plain[rows].std()
    assert spread > 0.01
    assert np.abs(plain - fused)[rows].max() < 0.1 * spread


def test_a_hopper_gets_every_kernel_there_is() -> None:
    assert on_h100(CLIMBER, LAYOUT, "9.0") == FUSED_CLIMBER
    assert on_h100(HSTU, LAYOUT, "9.0") == FUSED_HSTU
    assert on_h100(WHOLE, LAYOUT, "9.0") == FUSED_CLIMBER._replace(layer_stack="mosaic")
    assert choose_kernels(WHOLE, LAYOUT, "9.0", multiprocessors=114) == FUSED_CLIMBER
    assert on_h100(WHOLE, Layout(align=16, max_requests=4), "9.0").layer_stack == "xla"
    assert in_use(WHOLE, FUSED._replace(layer_stack="mosaic")).keys() == {
        "sumi_attention",
        "post_attention",
        "layer_stack",
    }
    assert in_use(HSTU, FUSED) == dict.fromkeys(("sumi_attention", "pre_attention", "gated_output"), "mosaic")
    assert in_use(CLIMBER, FUSED) == dict.fromkeys(("sumi_attention", "post_attention"), "mosaic")


@pytest.mark.parametrize("wanted", ["auto", "xla"])
def test_a_cpu_and_who_wants_it_get_the_reference(wanted: Any) -> None:
    assert on_h100(CLIMBER, LAYOUT, "", wanted) == REFERENCE
    assert on_h100(CLIMBER, LAYOUT, "9.0", "xla") == REFERENCE


@pytest.mark.parametrize(
    ("config", "capability", "reason"),
    [
        (replace(CLIMBER, dtype="float32"), "9.0", "sumi_attention.*dtype float32"),
        (replace(HSTU, hstu=HstuConfig(variant="research", value_dim=32)), "9.0", "no gather"),
        (CLIMBER, "8.0", r"for compute capability 9\.0, this is compute capability 8\.0"),
        (CLIMBER, "", "this is no GPU"),
    ],
)
def test_what_is_not_fused_is_told_or_refused(
    config: ModelConfig, capability: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=reason):
        on_h100(config, LAYOUT, capability, "mosaic")
    with caplog.at_level(logging.WARNING):
        assert on_h100(config, LAYOUT, capability).sumi_attention == "xla"
    assert bool(caplog.records) == bool(capability)


def test_a_gpu_on_which_thread_blocks_would_wait_forever_is_refused() -> None:
    whole = in_use(WHOLE, FUSED_CLIMBER._replace(layer_stack="mosaic"))
    assert "132 multiprocessors at once, this GPU has 114" in too_small(whole, 114)
    assert not too_small(whole, 132)
    assert not too_small(in_use(WHOLE, FUSED_CLIMBER), 114)
