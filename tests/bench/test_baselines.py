"""Every baseline scores what the packed model scores."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.artifacts import untrained
from bench.baselines import attention, runs, silu
from bench.baselines.inputs import Inputs, make_inputs, packed_run
from flame_jax.commandline import load
from flame_jax.config import Config, HeadConfig
from flame_jax.packing import Layout
from tests.oracles import climber as oracle
from tests.oracles.climber import OracleRequest

CONFIGS = Path(__file__).parents[2] / "configs"
HEAD = HeadConfig(experts=2, expert_hidden=8, tower_hidden=4)
CLIMBER: dict[str, attention.Attention] = runs.CLIMBER | {
    "cudnn": attention.FlashMasked(attention.xla),
    "cudnn_split": attention.FlashSplit(attention.xla),
    "tokamax": attention.FlashMasked(attention.Tokamax("xla")),
    "tokamax_split": attention.FlashSplit(attention.Tokamax("xla")),
}
HSTU: dict[str, silu.Attention] = runs.HSTU | {"split_chunked": silu.Split(chunk=8)}
"""What needs a GPU is replaced by what stands in for it."""
NARROW = "_narrow"
"""In float32 such a form is its wide one."""


def small(file: str) -> Config:
    """A configuration of `configs/`, small and in float32."""
    config = load(["--config", str(CONFIGS / file)], prog="test")
    model = replace(config.model, width=16, layers=2, heads=2, head_dim=8, ffn=32, dtype="float32", head=HEAD)
    if model.architecture == "hstu":
        hstu = replace(model.hstu, value_dim=4, attention_divisor=32, time_rows=64)
        model = replace(model, hstu=hstu, position_rows=16)
    schema = replace(config.schema, scenarios=("home", "search"), block_length=24)
    return replace(config, model=model, schema=schema, layout=Layout(align=8, max_requests=4))


@cache
def inputs(file: str) -> Inputs:
    """Three requests of 21 history rows a block and 5 candidates, and weights whose bias shows."""
    config, random = small(file), np.random.default_rng(5)
    weights = {
        name: (w + 0.2 * random.normal(size=w.shape)).astype(np.float32)
        for name, w in untrained(config, items=50).weights.items()
    }
    return make_inputs(config, 3, 21, 5, weights=weights)


@cache
def packed_scores(file: str) -> np.ndarray:
    run = packed_run(inputs(file))
    return run.scores(run.launch())


def check(file: str, form: Any) -> None:
    run = runs.jax_run(inputs(file), form)
    scores, right = run.scores(run.wait(run.launch())), packed_scores(file)
    assert scores.shape == right.shape
    assert right.std() > 0.01
    np.testing.assert_allclose(scores, right, atol=2e-5)


@pytest.mark.parametrize("name", sorted(name for name in CLIMBER if not name.endswith(NARROW)))
def test_climber_forms_score_as_the_packed_model(name: str) -> None:
    if name.startswith("tokamax") and importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed")
    check("climber_base.yaml", CLIMBER[name])


@pytest.mark.parametrize("name", sorted(name for name in HSTU if not name.endswith(NARROW)))
def test_hstu_forms_score_as_the_packed_model(name: str) -> None:
    check("hstu_dlrmv3.yaml", HSTU[name])


def test_the_batch_is_what_the_oracle_scores() -> None:
    made = inputs("climber_base.yaml")
    batch, model, h = made.regular, made.config.model, made.regular.history
    for row in range(len(batch.request_time)):
        request = OracleRequest(
            blocks=[
                (batch.items[b, row, :h], batch.actions[b, row, :h], batch.times[b, row])
                for b in range(len(made.config.schema.blocks))
            ],
            request_time=int(batch.request_time[row]),
            scenario=int(batch.scenario[row]),
            candidates=batch.items[0, row, h:],
            item_features={},
            user_features={},
            context_features={},
        )
        expected = oracle.rank(
            dict(made.weights), made.config.schema, request, heads=model.heads, head_dim=model.head_dim
        )
        np.testing.assert_allclose(packed_scores("climber_base.yaml")[row], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("file", "form", "shape"),
    [
        ("climber_base.yaml", attention.SplitSoftmax(), (2, 3, 5, 16)),
        ("hstu_dlrmv3.yaml", silu.Split(), (3, 5, 16)),
    ],
)
def test_the_layers_alone_can_be_run(file: str, form: Any, shape: tuple[int, ...]) -> None:
    run = runs.jax_run(inputs(file), form, "stack")
    assert run.scores(run.launch()).shape == shape


def test_every_baseline_of_a_model_is_offered_and_none_is_compiled_yet() -> None:
    assert set(runs.jax_runs(inputs("climber_base.yaml"))) == set(runs.CLIMBER)
    assert set(runs.jax_runs(inputs("hstu_dlrmv3.yaml"))) == set(runs.HSTU)


def test_what_baselines_do_not_have_is_refused() -> None:
    config = small("climber_base.yaml")
    ablated = replace(config, model=replace(config.model, climber=replace(config.model.climber, adaptive=False)))
    with pytest.raises(ValueError, match="without ablations"):
        make_inputs(ablated, 1, 8, 8)
    with pytest.raises(ValueError, match="block_length"):
        make_inputs(config, 1, 25, 8)
