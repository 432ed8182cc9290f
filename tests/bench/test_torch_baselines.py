"""Every PyTorch baseline scores what the packed model scores, where torch is installed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    from bench.baselines import torch_attention, torch_models

from tests.bench.test_baselines import inputs, packed_scores

# torch warns of its own parts.
pytestmark = pytest.mark.filterwarnings("default")


def check(file: str, form: Any, mode: Any, options: Any = None) -> None:
    run = torch_models.torch_run(inputs(file), form, mode, "cpu", options)
    scores = run.scores(run.wait(run.launch()))
    np.testing.assert_allclose(scores, packed_scores(file), atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "split", "sdpa", "flex"])
def test_climber_forms_score_as_the_packed_model(name: str) -> None:
    check("climber_base.yaml", torch_attention.CLIMBER[name], "eager")


@pytest.mark.parametrize("name", ["split", "flex_split"])
def test_climber_forms_compile(name: str) -> None:
    """In one graph: nothing falls back to Python."""
    check("climber_base.yaml", torch_attention.CLIMBER[name], "compile", {"backend": "eager"})


@pytest.mark.parametrize("name", sorted(torch_attention.HSTU))
def test_hstu_forms_score_as_the_packed_model(name: str) -> None:
    check("hstu_dlrmv3.yaml", torch_attention.HSTU[name], "eager")


def test_hstu_in_chunks_scores_as_the_packed_model() -> None:
    check("hstu_dlrmv3.yaml", lambda *a: torch_attention.silu_split(*a, chunk=8), "compile", {"backend": "eager"})
