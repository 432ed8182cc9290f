"""Climber on packed batches against the float64 oracle, and what must not change a score."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.config import ModelConfig
from flame_jax.models.climber import Climber
from flame_jax.models.serving import flat_weights, load_weights, rank_function, unpack
from flame_jax.packing import Bucket, Layout, slot_layout
from flame_jax.schema import Block, Feature, FeatureSchema
from tests.oracles import climber as oracle
from tests.packed import pack, random_request

ROWS = 50
SCHEMA = FeatureSchema(
    tasks=("click", "like"),
    scenarios=("home", "search", "radio"),
    actions=4,
    blocks=(Block("all"), Block("liked", (2, 3))),
    block_length=24,
    item_features=(Feature("genres", "bits", 5), Feature("year", "numeric")),
    user_features=(Feature("age", "categorical", 7),),
    context_features=(Feature("hour", "categorical", 24), Feature("speed", "numeric")),
)
CONFIG = ModelConfig(width=16, layers=2, heads=2, head_dim=8, ffn=24, gate_reduction=2, head_hidden=12)
LAYOUT = Layout(align=8, max_requests=6)
BUCKET = Bucket(160, 96)

Rank = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Every weight away from its initial value, so that none is untested."""
    random = np.random.default_rng(0)
    model = Climber(CONFIG, SCHEMA, ROWS, rngs=nnx.Rngs(0))
    return {name: w + 0.2 * random.normal(size=w.shape).astype(np.float32) for name, w in flat_weights(model).items()}


@pytest.fixture(scope="module")
def rank(weights: dict[str, np.ndarray]) -> Rank:
    function = jax.jit(rank_function(CONFIG, SCHEMA, LAYOUT, slot_layout(SCHEMA, LAYOUT, BUCKET), ROWS))
    flat = [jax.numpy.asarray(w) for w in weights.values()]
    return lambda words: np.asarray(function(flat, words))


shapes = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24), st.integers(1, 20)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=15)
@given(shapes=shapes, seed=st.integers(0, 2**32 - 1))
def test_scores_match_the_oracle(
    rank: Rank, weights: dict[str, np.ndarray], shapes: list[tuple[int, int, int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    requests = [random_request(SCHEMA, random, lengths=[a, b], candidates=c, rows=ROWS) for a, b, c in shapes]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests, dirt=random)
    scores = rank(packed.words)
    assert np.isfinite(scores).all()
    for request, where in zip(requests, packed.places, strict=True):
        first = where.candidate_start - (BUCKET.tokens - BUCKET.candidates)
        ours = scores[first : first + len(request.candidates)]
        expected = oracle.rank(weights, SCHEMA, request, heads=CONFIG.heads, head_dim=CONFIG.head_dim)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), before=st.integers(0, 2), after=st.integers(0, 2), data=st.data())
def test_a_score_has_the_same_bits_in_any_company_and_order(
    rank: Rank, seed: int, before: int, after: int, data: st.DataObject
) -> None:
    random = np.random.default_rng(seed)
    ours = random_request(SCHEMA, random, lengths=[13, 24], candidates=15, rows=ROWS)
    alone = pack(SCHEMA, LAYOUT, BUCKET, [ours])
    base = BUCKET.tokens - BUCKET.candidates
    first = alone.places[0].candidate_start - base
    expected = rank(alone.words)[first : first + 15]

    kept = np.array(data.draw(st.permutations(range(15)))[: data.draw(st.integers(1, 15))])
    shuffled = oracle.OracleRequest(
        blocks=ours.blocks,
        request_time=ours.request_time,
        scenario=ours.scenario,
        candidates=ours.candidates[kept],
        item_features={name: column[kept] for name, column in ours.item_features.items()},
        user_features=ours.user_features,
        context_features=ours.context_features,
    )
    others = [random_request(SCHEMA, random, lengths=[8, 3], candidates=10, rows=ROWS) for _ in range(before + after)]
    packed = pack(SCHEMA, LAYOUT, BUCKET, [*others[:before], shuffled, *others[before:]], dirt=random)
    first = packed.places[before].candidate_start - base
    assert np.array_equal(rank(packed.words)[first : first + len(kept)], expected[kept])


def test_an_empty_slot_gives_finite_scores(rank: Rank) -> None:
    assert np.isfinite(rank(np.zeros(slot_layout(SCHEMA, LAYOUT, BUCKET).words, np.int32))).all()


def test_buckets_agree_within_1e_5(weights: dict[str, np.ndarray], rank: Rank) -> None:
    random = np.random.default_rng(9)
    request = random_request(SCHEMA, random, lengths=[24, 11], candidates=17, rows=ROWS)
    results = []
    for bucket in (Bucket(64, 32), Bucket(256, 160)):
        function = jax.jit(rank_function(CONFIG, SCHEMA, LAYOUT, slot_layout(SCHEMA, LAYOUT, bucket), ROWS))
        packed = pack(SCHEMA, LAYOUT, bucket, [request])
        first = packed.places[0].candidate_start - (bucket.tokens - bucket.candidates)
        results.append(np.asarray(function(list(weights.values()), packed.words))[first : first + 17])
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0, 24])
def test_gradients_are_finite_on_empty_and_full_histories(weights: dict[str, np.ndarray], length: int) -> None:
    random = np.random.default_rng(1)
    request = random_request(SCHEMA, random, lengths=[length, length], candidates=5, rows=ROWS)
    packed = pack(SCHEMA, LAYOUT, BUCKET, [request])
    model = Climber(CONFIG, SCHEMA, ROWS, rngs=nnx.Rngs(0))
    load_weights(model, weights)
    fields = unpack(jax.numpy.asarray(packed.words), slot_layout(SCHEMA, LAYOUT, BUCKET))

    def loss(model: Climber) -> jax.Array:
        return model(fields, layout=LAYOUT, candidates=BUCKET.candidates)[-8:].sum()

    gradients = jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))
    assert gradients
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)


def test_bfloat16_stays_near_float32(weights: dict[str, np.ndarray], rank: Rank) -> None:
    """Tolerance on the probability: 99 % of scores within 0.02, all within 0.06."""
    config = ModelConfig(**{**vars(CONFIG), "dtype": "bfloat16"})
    function = jax.jit(rank_function(config, SCHEMA, LAYOUT, slot_layout(SCHEMA, LAYOUT, BUCKET), ROWS))
    random = np.random.default_rng(2)
    gaps = []
    for _ in range(8):
        request = random_request(SCHEMA, random, lengths=[24, 20], candidates=90, rows=ROWS)
        packed = pack(SCHEMA, LAYOUT, BUCKET, [request])
        gap = np.abs(np.asarray(function(list(weights.values()), packed.words)) - rank(packed.words))
        gaps.append(gap[-96:-6])
    every = np.concatenate(gaps)
    assert np.quantile(every, 0.99) < 0.02
    assert every.max() < 0.06
