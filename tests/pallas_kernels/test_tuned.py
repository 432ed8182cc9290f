"""Measured block sizes as data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from flame_jax.pallas_kernels import tuned
from flame_jax.pallas_kernels.gated_output import mosaic as gated_output
from flame_jax.pallas_kernels.post_attention import mosaic as post_attention
from flame_jax.pallas_kernels.post_attention.mosaic_form import Tiling as LayerTiling
from flame_jax.pallas_kernels.pre_attention import mosaic as pre_attention
from flame_jax.pallas_kernels.sumi_attention import mosaic as sumi_attention
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Tiling

SHAPE = {"width": 128, "inner": 128, "hidden": 512}
ENTRIES = {
    "post_attention": [
        {"shape": SHAPE, "rows": 100, "tiling": {"warpgroups": 1, "chunk": 64, "stages": 2}},
        {"shape": SHAPE, "rows": 10000, "tiling": {"warpgroups": 3, "chunk": 64, "stages": 2}},
    ]
}


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_entries", lambda: ENTRIES)
    tuned._tell.cache_clear()


@pytest.mark.parametrize(("rows", "warpgroups"), [(1, 1), (900, 1), (1100, 3), (10**6, 3)])
def test_the_nearest_measurement_counts(rows: int, warpgroups: int) -> None:
    assert post_attention.tiling_for(SHAPE, rows) == LayerTiling(warpgroups, 64, 2)


def test_a_shape_that_was_not_measured_is_told_once_and_guessed(caplog: pytest.LogCaptureFixture) -> None:
    shape = {"qk_dim": 256, "v_dim": 64, "bias": False}
    with caplog.at_level(logging.WARNING):
        guesses = {sumi_attention.tiling_for(shape, rows) for rows in (1, 1000)}
    assert guesses == {Tiling(warpgroups=1)}
    (record,) = caplog.records
    assert "sumi_attention has no measured block sizes" in record.getMessage()


TILINGS: dict[str, Callable[[Any, int], object]] = {
    "sumi_attention": sumi_attention.tiling_for,
    "paged_attention": partial(sumi_attention.tiling_for, paged=True),
    "post_attention": post_attention.tiling_for,
    "pre_attention": pre_attention.tiling_for,
    "gated_output": gated_output.tiling_for,
}


def test_what_is_shipped_names_tilings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.undo()
    shipped = tuned._entries()
    assert shipped.keys() == TILINGS.keys()
    with caplog.at_level(logging.WARNING):
        for operation, entries in shipped.items():
            for entry in entries:
                assert TILINGS[operation](entry["shape"], entry["rows"])
    assert not caplog.records
