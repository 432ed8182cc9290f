"""Every ranker on packed batches: against its float64 oracle, and what must not change a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.config import ClimberConfig, HeadConfig, HstuConfig, ModelConfig
from flame_jax.models.params import Column
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import flat_weights, load_weights, rank_function, served_specs, served_weights, unpack
from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.schema import Block, Feature, FeatureSchema
from tests.oracles import climber, hstu, transformer
from tests.oracles.climber import OracleRequest
from tests.packed import pack, random_request

ROWS = 50
LENGTH = 12
TWO_BLOCKS = FeatureSchema(
    tasks=("click", "like"),
    scenarios=("home", "search", "radio"),
    actions=4,
    blocks=(Block("all"), Block("liked", (2, 3))),
    block_length=LENGTH,
    item_features=(
        Feature("genres", "bits", 5),
        Feature("year", "numeric"),
        Feature("maker", "id", 6),
        Feature("shop", "id", 4, "table"),
        Feature("weight", "numeric", 0, "table"),
    ),
    user_features=(Feature("age", "categorical", 7),),
    context_features=(Feature("hour", "categorical", 24), Feature("speed", "numeric")),
)
ONE_BLOCK = replace(TWO_BLOCKS, blocks=(Block("all"),))
INTERLEAVED = replace(ONE_BLOCK, interleave=True)
HEAD = HeadConfig(experts=3, expert_hidden=10, tower_hidden=6)
LAYOUT = Layout(align=8, max_requests=6)
BUCKET = Bucket(192, 72)

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model, its schema, and how its oracle is asked."""

    config: ModelConfig
    schema: FeatureSchema
    oracle: Callable[[Weights, OracleRequest], np.ndarray]


def make_hstu(variant: str, schema: FeatureSchema, *, encoded: bool = False) -> Case:
    options = HstuConfig(
        variant=variant,  # type: ignore[arg-type]
        value_dim=6,
        attention_divisor=20.0,
        time_rows=9 if encoded else 0,
        bias_positions=7,
        bias_buckets=40,
    )
    config = ModelConfig(
        architecture="hstu",
        width=16,
        layers=2,
        heads=2,
        head_dim=8,
        position_rows=10 if encoded else 0,
        head=HEAD,
        hstu=options,
    )
    about = hstu.Settings(options.variant, 2, 8, 6, 20.0, interleave=schema.interleave, bias_positions=7)
    return Case(config, schema, lambda weights, request: hstu.rank(weights, schema, request, about))


CLIMBER = ModelConfig(
    width=16, layers=2, heads=2, head_dim=8, ffn=24, head=HEAD, climber=ClimberConfig(gate_reduction=2)
)
TRANSFORMER = ModelConfig(
    architecture="transformer", width=16, layers=2, heads=2, head_dim=8, ffn=24, head=HEAD, position_rows=8
)
CASES = {
    "climber": Case(CLIMBER, TWO_BLOCKS, lambda w, r: climber.rank(w, TWO_BLOCKS, r, heads=2, head_dim=8)),
    "transformer": Case(TRANSFORMER, ONE_BLOCK, lambda w, r: transformer.rank(w, ONE_BLOCK, r, heads=2, head_dim=8)),
    "hstu dlrm_v3": make_hstu("dlrm_v3", ONE_BLOCK),
    "hstu dlrm_v3 encoded": make_hstu("dlrm_v3", ONE_BLOCK, encoded=True),
    "hstu recsys_examples": make_hstu("recsys_examples", INTERLEAVED),
    "hstu research": make_hstu("research", ONE_BLOCK),
}
every_case = pytest.mark.parametrize("name", CASES)


@cache
def weights_of(name: str) -> Weights:
    """Every weight away from its initial value, so that none is untested."""
    case, random = CASES[name], np.random.default_rng(0)
    initial = flat_weights(make_ranker(case.config, case.schema, ROWS, rngs=nnx.Rngs(0)))
    weights = {name: w + 0.2 * random.normal(size=w.shape).astype(w.dtype) for name, w in initial.items()}
    return weights | {"columns/item.shop": random.integers(0, 5, ROWS).astype(np.int32)}


@cache
def ranker(name: str, bucket: Bucket = BUCKET, dtype: str = "float32") -> Callable[[np.ndarray], np.ndarray]:
    case = CASES[name]
    slot = slot_layout(case.schema, LAYOUT, bucket)
    config = replace(case.config, dtype=dtype)  # type: ignore[arg-type]
    function = jax.jit(rank_function(config, case.schema, LAYOUT, slot, ROWS))
    flat = [jax.numpy.asarray(w) for w in weights_of(name).values()]
    return lambda words: np.asarray(function(flat, words))


def requests_of(name: str, shapes: list[tuple[int, int, int]], random: np.random.Generator) -> list[OracleRequest]:
    schema = CASES[name].schema
    return [
        random_request(schema, random, lengths=[a, b][: len(schema.blocks)], candidates=c, rows=ROWS)
        for a, b, c in shapes
    ]


def scores_of(
    name: str, requests: list[OracleRequest], *, bucket: Bucket = BUCKET, dtype: str = "float32"
) -> list[np.ndarray]:
    """Scores per request of one packed batch whose slot held an earlier batch."""
    packed = pack(CASES[name].schema, LAYOUT, bucket, requests, dirt=np.random.default_rng(0))
    scores = ranker(name, bucket, dtype)(packed.words)
    assert np.isfinite(scores).all()
    firsts = [where.candidate_start - (bucket.tokens - bucket.candidates) for where in packed.places]
    return [scores[at : at + len(r.candidates)] for at, r in zip(firsts, requests, strict=True)]


shapes = st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH), st.integers(1, 20)), min_size=1, max_size=3)


@every_case
@settings(max_examples=10)
@given(shapes=shapes, seed=st.integers(0, 2**32 - 1))
def test_scores_match_the_oracle(name: str, shapes: list[tuple[int, int, int]], seed: int) -> None:
    requests = requests_of(name, shapes, np.random.default_rng(seed))
    for request, ours in zip(requests, scores_of(name, requests), strict=True):
        np.testing.assert_allclose(ours, CASES[name].oracle(weights_of(name), request), rtol=1e-5, atol=1e-5)


@every_case
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), before=st.integers(0, 2), after=st.integers(0, 2), data=st.data())
def test_a_score_has_the_same_bits_in_any_company_and_order(
    name: str, seed: int, before: int, after: int, data: st.DataObject
) -> None:
    random = np.random.default_rng(seed)
    (ours,) = requests_of(name, [(7, LENGTH, 15)], random)
    (expected,) = scores_of(name, [ours])
    kept = np.array(data.draw(st.permutations(range(15)))[: data.draw(st.integers(1, 15))])
    shuffled = replace(
        ours,
        candidates=ours.candidates[kept],
        item_features={feature: column[kept] for feature, column in ours.item_features.items()},
    )
    others = requests_of(name, [(8, 3, 8)] * (before + after), random)
    together = scores_of(name, [*others[:before], shuffled, *others[before:]])
    assert np.array_equal(together[before], expected[kept])


@every_case
def test_buckets_agree_within_1e_5(name: str) -> None:
    request = requests_of(name, [(LENGTH, 11, 17)], np.random.default_rng(9))
    (small,), (large,) = scores_of(name, request, bucket=Bucket(64, 32)), scores_of(name, request)
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-5)


@every_case
def test_an_empty_slot_gives_finite_scores(name: str) -> None:
    words = np.zeros(slot_layout(CASES[name].schema, LAYOUT, BUCKET).words, np.int32)
    assert np.isfinite(ranker(name)(words)).all()


@every_case
def test_gradients_are_finite_on_empty_and_full_histories(name: str) -> None:
    case = CASES[name]
    slot = slot_layout(case.schema, LAYOUT, BUCKET)
    model = make_ranker(case.config, case.schema, ROWS, rngs=nnx.Rngs(0))
    load_weights(model, weights_of(name))
    graph, *parts = nnx.split(model, nnx.Param, Column)
    state, columns = parts

    @jax.jit
    def gradient(state: Any, words: jax.Array) -> Any:
        def loss(state: Any) -> jax.Array:
            fields = unpack(words, slot)
            return nnx.merge(graph, state, columns)(fields, layout=LAYOUT, candidates=BUCKET.candidates)[-8:].sum()

        return jax.grad(loss)(state)

    for length in (0, LENGTH):
        requests = requests_of(name, [(length, length, 5)], np.random.default_rng(1))
        leaves = jax.tree.leaves(gradient(state, pack(case.schema, LAYOUT, BUCKET, requests).words))
        assert leaves
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


@every_case
def test_the_candidate_rows_of_the_last_layer_are_those_of_the_whole_layer(name: str) -> None:
    """Where every row may hold a candidate, the last layer is computed for all of them.

    Tolerance: 1e-5 of the scale of the logits in float32; in bfloat16 0.03 on the probability for 99 % of scores.
    """
    requests = requests_of(name, [(LENGTH, 5, 20), (3, 0, 17), (0, 2, 1)], np.random.default_rng(3))
    for dtype in ("float32", "bfloat16"):
        only, whole = (
            np.concatenate(scores_of(name, requests, bucket=bucket, dtype=dtype)).astype(np.float64)
            for bucket in (BUCKET, Bucket(BUCKET.tokens, BUCKET.tokens))
        )
        if dtype == "float32":
            only, whole = np.log(only / (1 - only)), np.log(whole / (1 - whole))
            np.testing.assert_allclose(only, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
        else:
            assert np.quantile(np.abs(only - whole), 0.99) < 0.03


def test_tables_are_served_in_bfloat16_where_the_model_says_so() -> None:
    case = CASES["climber"]
    config = replace(case.config, table_dtype="bfloat16")
    specs = served_specs(config, case.schema, ROWS)
    small = {name for name, spec in specs.items() if spec.dtype == jax.numpy.bfloat16}
    assert small == {"item", *(name for name in specs if name.startswith("features/"))}
    weights = served_weights(config, weights_of("climber"))
    assert {name: (w.shape, w.dtype) for name, w in weights.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    requests = requests_of("climber", [(LENGTH, 5, 20), (3, 0, 17)], np.random.default_rng(3))
    packed = pack(case.schema, LAYOUT, BUCKET, requests)
    function = jax.jit(rank_function(config, case.schema, LAYOUT, slot_layout(case.schema, LAYOUT, BUCKET), ROWS))
    scores = np.asarray(function([jax.numpy.asarray(w) for w in weights.values()], packed.words))
    # The oracle reads the rounded tables; everything after them is float32.
    rounded = {name: w.astype(np.float32) if name in small else w for name, w in weights.items()}
    for request, where in zip(requests, packed.places, strict=True):
        first = where.candidate_start - (BUCKET.tokens - BUCKET.candidates)
        np.testing.assert_allclose(
            scores[first : first + len(request.candidates)], case.oracle(rounded, request), rtol=1e-4, atol=1e-6
        )


def test_what_is_used_in_the_models_dtype_is_served_in_it() -> None:
    case = CASES["hstu dlrm_v3 encoded"]
    specs = served_specs(replace(case.config, dtype="bfloat16"), case.schema, ROWS)
    small = {name for name, spec in specs.items() if spec.dtype == jax.numpy.bfloat16}
    assert {"position", "time", "layers/uvqk_w", "head/expert_w"} <= small
    assert not {"item", "action", "item_bias", "final_scale", "layers/uvqk_b", "head/logit_w"} & small


@every_case
def test_bfloat16_stays_near_float32(name: str) -> None:
    """Tolerance on the probability: 99 % of scores within 0.03, all within 0.08."""
    random = np.random.default_rng(2)
    gaps = []
    for _ in range(8):
        requests = requests_of(name, [(LENGTH, 10, 70)], random)
        (ours,), (exact,) = scores_of(name, requests, dtype="bfloat16"), scores_of(name, requests)
        gaps.append(np.abs(ours - exact))
    every = np.concatenate(gaps)
    assert np.quantile(every, 0.99) < 0.03
    assert every.max() < 0.08


@pytest.mark.parametrize("name", ["transformer", "hstu dlrm_v3"])
def test_models_of_one_block_refuse_two(name: str) -> None:
    with pytest.raises(ValueError, match="one block"):
        make_ranker(CASES[name].config, TWO_BLOCKS, ROWS, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("part", "missing"), [("fusion", "gate/squeeze_w"), ("adaptive", "layers/bias")])
def test_climbers_parts_can_be_left_out(part: str, missing: str) -> None:
    """The ablations of the paper's table: without fusion, without the adaptive layer."""
    config = replace(CLIMBER, climber=replace(CLIMBER.climber, **{part: False}))
    weights = flat_weights(make_ranker(config, TWO_BLOCKS, ROWS, rngs=nnx.Rngs(0)))
    assert missing in weights_of("climber")
    assert missing not in weights
    function = jax.jit(rank_function(config, TWO_BLOCKS, LAYOUT, slot_layout(TWO_BLOCKS, LAYOUT, BUCKET), ROWS))
    packed = pack(TWO_BLOCKS, LAYOUT, BUCKET, requests_of("climber", [(5, 3, 9)], np.random.default_rng(3)))
    assert np.isfinite(np.asarray(function(list(weights.values()), packed.words))).all()
