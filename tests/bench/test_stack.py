"""HSTU's layers alone, small and on the CPU: packed, in pages and as plain programs they give the same rows."""

from __future__ import annotations

import pickle
from functools import cache, partial
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

from bench.baselines import dense
from bench.baselines.inputs import Run
from bench.baselines.runs import program
from bench.baselines.silu import Silu, Split
from bench.baselines.weights import Layer
from bench.fke import layers, pages, passes, stack
from bench.timing import side_by_side
from flame_jax.pallas_kernels.kernels import REFERENCE
from tests.bench.test_baselines import inputs

FILE = "hstu_dlrmv3.yaml"
"""Three requests of 21 history rows and 5 candidates; width 16, 2 layers, 2 heads of 8, values of 4."""
CASES = [stack.Case("hstu_dlrmv3", 3, 21, 5, given, 10.0, 5.0) for given in (False, True)]


def function(first: int) -> layers.Layers:
    config = inputs(FILE).config
    return layers.Layers(config.model, config.layout.align, config.layout.aligned(21), first, REFERENCE)


@cache
def engine(first: int) -> Run:
    """The engine's layers, compiled once: whole, or from row 0 on candidates alone."""
    operands = layers.whole(inputs(FILE))[0] if first else layers.candidates_alone(inputs(FILE), own_history())
    return layers.layers_run(function(first), operands, inputs(FILE))


@cache
def own_history() -> layers.History:
    """What the layers themselves compute of the history."""
    _, operands = program(inputs(FILE), None, "stack")

    @jax.jit
    def captured(tokens: jax.Array, weights: list[Layer]) -> layers.History:
        found: layers.History = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, silu: Silu) -> jax.Array:
            found.append((k[:, : silu.history], v[:, : silu.history]))
            return Split()(q, k, v, silu)

        dense.hstu_stack(tokens, weights, history=21, config=inputs(FILE).config.model, attention=attend)
        return found

    history: layers.History = captured(*operands)
    return history


def test_both_cases_have_rows_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "batch", lambda *_: inputs(FILE))
    monkeypatch.setattr(stack, "random_history", lambda _: own_history())
    monkeypatch.setattr(stack, "layers_run", lambda made, *_: engine(made.first))
    monkeypatch.setattr(passes, "side_by_side", lambda runs, rounds, seconds, wait: side_by_side(runs, 1, 0.001, wait))
    found = stack.stack([], ["split", "split_given"], jax.devices()[0], print, CASES)
    whole, given = found["stack"]
    assert whole["ms"].keys() == {"fused", "reference", "split"}
    assert given["ms"].keys() == {"fused", "reference", "split_given"}
    assert max(*whole["apart"].values(), *given["apart"].values()) < 1e-4
    assert whole["stated_ratio"] == pytest.approx(10 / whole["ms"]["fused"])
    assert [point["fused"] for point in found["points"]] == [True, False] * 2
    assert "| hstu_dlrmv3 stack B=3, 21+5, history K/V given |" in stack.table(found["stack"])


def test_a_case_without_its_baselines_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(stack, "_prepare", lambda *_: pytest.fail("nothing is to be prepared"))
    stack.stack(["given"], ["split"], jax.devices()[0], said.append, CASES)
    assert said == ["hstu_dlrmv3 stack B=3, 21+5, history K/V given: left out, it has none of these baselines"]


def test_candidates_on_the_historys_own_keys_and_values_come_out_as_in_the_whole_stack() -> None:
    whole, alone = (run.scores(run.launch()) for run in map(engine, (layers.whole(inputs(FILE))[1], 0)))
    assert whole.std() > 0.1
    np.testing.assert_allclose(alone, whole, atol=2e-5)


def test_a_random_history_has_the_shape_of_a_real_one() -> None:
    made, real = jax.eval_shape(lambda: layers.random_history(inputs(FILE))), own_history()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


def test_useful_work_of_candidates_alone_is_counted() -> None:
    row = 2 * 16 * 2 * (2 * 8 + 2 * 4) + 2 * 3 * 2 * 4 * 16  # to u, v, q and k of both heads; from u, o and both
    pair = 2 * 2 * (8 + 4)
    assert stack.given_flops(inputs(FILE)) == 2 * 3 * 5 * (row + 22 * pair)
    operands = layers.candidates_alone(inputs(FILE), own_history())
    weights = sum(w.size for w in operands[1].values())
    history = 2 * 21 * 2 * (8 + 4)
    assert stack.least_bytes(CASES[1], inputs(FILE), operands) == 4 * (weights + 3 * (2 * 5 * 16 + history))


def test_the_layers_can_be_sent_to_a_process_that_lowers_them() -> None:
    operands = layers.candidates_alone(inputs(FILE), own_history())
    specs: Any = jax.eval_shape(lambda: operands)
    sent = pickle.loads(pickle.dumps(partial(layers.exported, function(0), specs)))
    assert jax.export.deserialize(bytearray(sent())).platforms == ("cuda",)


def test_pages_hold_histories_and_poison() -> None:
    random = np.random.default_rng(0)
    lengths = np.array([[130, 3], [0, 0], [128, 60]])
    table = pages.page_table(lengths.max(axis=1), 2, 8, random)
    dense_rows = random.normal(size=(2, 3, 130, 1)).astype(np.float32)
    pool = np.asarray(pages.cut(jax.numpy.asarray(dense_rows), jax.numpy.asarray(lengths), jax.numpy.asarray(table), 8))
    for request, of_block in enumerate(lengths):
        for block, length in enumerate(of_block):
            found = pool[block, table[request]].reshape(-1)[:length]
            np.testing.assert_array_equal(found, dense_rows[block, request, :length, 0])
    assert np.isfinite(pool).sum() == lengths.sum()
