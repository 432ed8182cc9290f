"""SUMI attention on packed batches against the float64 oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import Bucket, Layout
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Softmax
from flame_jax.schema import Block, FeatureSchema
from tests.oracles import climber as oracle
from tests.packed import Packed, pack, random_request

HEADS, DIM, WINDOW = 2, 8, 32
SCHEMA = FeatureSchema(scenarios=("a", "b"), blocks=(Block("x"), Block("y")), block_length=WINDOW)
LAYOUT = Layout(align=8, max_requests=5)
BUCKET = Bucket(160, 96)


@jax.jit
def full(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, time: jax.Array, tau: jax.Array, bias: jax.Array
) -> jax.Array:
    temperature = jax.nn.softplus(tau)
    activation, log_bias = Softmax(temperature), LogBias(bias)
    return sumi_attention(q, k, v, rows, time, activation=activation, bias=log_bias, align=LAYOUT.align, window=WINDOW)


def weights(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(SCHEMA.blocks), len(SCHEMA.scenarios), HEADS)
    return random.normal(size=shape).astype(np.float32), (0.1 * random.normal(size=(*shape, 3))).astype(np.float32)


def qkv(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (3, len(SCHEMA.blocks), BUCKET.tokens, HEADS, DIM)
    q, k, v = random.normal(size=shape).astype(np.float32)
    return q, k, v


def rows_of(packed: Packed, request: int, block: int, length: int, count: int) -> np.ndarray:
    where = packed.places[request]
    history = np.arange(where.history_start, where.history_start + length)
    return np.concatenate([history, np.arange(where.candidate_start, where.candidate_start + count)])


shapes = st.lists(
    st.tuples(st.integers(0, 24), st.integers(0, 24), st.integers(1, 20)), min_size=1, max_size=3
)  # history of both blocks, candidates


@settings(deadline=None, max_examples=25)
@given(shapes=shapes, seed=st.integers(0, 2**32 - 1))
def test_every_request_matches_the_oracle_whatever_its_neighbours(
    shapes: list[tuple[int, int, int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    requests = [random_request(SCHEMA, random, lengths=[a, b], candidates=c, rows=10) for a, b, c in shapes]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests, dirt=random)
    q, k, v = qkv(random)
    tau, bias = weights(random)
    out = np.asarray(full(q, k, v, packed.fields["rows"], packed.fields["time"], tau, bias))
    assert np.isfinite(out).all()
    for number, request in enumerate(requests):
        for block, (items, _, times) in enumerate(request.blocks):
            at = rows_of(packed, number, block, len(items), len(request.candidates))
            for head in range(HEADS):
                alpha, beta, gamma = bias[block, request.scenario, head]
                expected = oracle.sumi_attention(
                    *(x[block, at, head] for x in (q, k, v)),
                    history_length=len(items),
                    history_times=times,
                    request_time=request.request_time,
                    alpha=alpha,
                    beta=beta,
                    gamma=gamma,
                    tau=tau[block, request.scenario, head],
                )
                np.testing.assert_allclose(out[block, at, head], expected, rtol=1e-4, atol=2e-5)


def test_a_request_alone_and_among_others_has_the_same_bits() -> None:
    random = np.random.default_rng(3)
    ours = random_request(SCHEMA, random, lengths=[20, 7], candidates=11, rows=10)
    others = [random_request(SCHEMA, random, lengths=[9, 24], candidates=13, rows=10) for _ in range(2)]
    tau, bias = weights(random)
    own = qkv(random)
    results = []
    for requests, position in (([ours], 0), ([others[0], ours, others[1]], 1), ([*others, ours], 2)):
        packed = pack(SCHEMA, LAYOUT, BUCKET, requests, dirt=random)
        noise = qkv(random)
        where = packed.places[position]
        for mine, theirs in zip(own, noise, strict=True):
            theirs[:, where.history_start : where.history_start + 20] = mine[:, :20]
            theirs[:, where.candidate_start : where.candidate_start + 11] = mine[:, 20:31]
        out = np.asarray(full(*noise, packed.fields["rows"], packed.fields["time"], tau, bias))
        at = rows_of(packed, position, 0, 20, 11)
        results.append(out[0, at])
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_candidate_rows_alone_equal_the_last_rows_of_all() -> None:
    random = np.random.default_rng(4)
    requests = [random_request(SCHEMA, random, lengths=[5, 16], candidates=9, rows=10) for _ in range(3)]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests)
    q, k, v = qkv(random)
    tau, bias = weights(random)
    rows, time = packed.fields["rows"], packed.fields["time"]
    whole = full(q, k, v, rows, time, tau, bias)
    tail = full(q[:, -BUCKET.candidates :], k, v, rows, time, tau, bias)
    np.testing.assert_allclose(tail, whole[:, -BUCKET.candidates :], rtol=1e-6, atol=1e-6)


def test_an_empty_slot_is_finite() -> None:
    random = np.random.default_rng(5)
    q, k, v = qkv(random)
    tau, bias = weights(random)
    rows = np.zeros((LAYOUT.max_requests, 5 + len(SCHEMA.blocks)), np.int32)
    out = full(q, k, v, rows, np.zeros((2, BUCKET.tokens), np.int32), tau, bias)
    assert np.isfinite(np.asarray(out)).all()


def test_times_of_seventy_years_apart_do_not_overflow() -> None:
    random = np.random.default_rng(6)
    request = random_request(SCHEMA, random, lengths=[2, 2], candidates=1, rows=10)
    packed = pack(SCHEMA, LAYOUT, BUCKET, [request])
    q, k, v = qkv(random)
    tau, _ = weights(random)
    bias = np.zeros((*tau.shape, 3), np.float32)
    bias[..., 1] = -1.0
    time = packed.fields["time"]
    where = packed.places[0]
    time[:, where.history_start : where.history_start + 2] = (0, 2**31 - 1)
    time[:, where.candidate_start] = 2**31 - 1
    out = np.asarray(full(q, k, v, packed.fields["rows"], time, tau, bias))
    expected = oracle.sumi_attention(
        *(x[0, [where.history_start, where.history_start + 1, where.candidate_start], 0] for x in (q, k, v)),
        history_length=2,
        history_times=np.array([0, 2**31 - 1]),
        request_time=2**31 - 1,
        alpha=0.0,
        beta=-1.0,
        gamma=0.0,
        tau=float(tau[0, request.scenario, 0]),
    )
    np.testing.assert_allclose(out[0, where.candidate_start, 0], expected[2], rtol=1e-4, atol=1e-5)


def test_rows_off_the_alignment_are_refused() -> None:
    x = jnp.zeros((1, 12, 1, 4))
    with pytest.raises(ValueError, match="multiples of 8"):
        sumi_attention(
            x,
            x,
            x,
            jnp.zeros((1, 6), jnp.int32),
            jnp.zeros((1, 12), jnp.int32),
            activation=Softmax(jnp.ones((1, 1, 1))),
            align=8,
            window=8,
        )


def test_a_neighbours_nan_stays_with_the_neighbour() -> None:
    random = np.random.default_rng(0)
    requests = [random_request(SCHEMA, random, lengths=[3, 5], candidates=4, rows=10) for _ in range(2)]
    packed = pack(SCHEMA, LAYOUT, BUCKET, requests, dirt=random)
    q, k, v = qkv(random)
    tau, bias = weights(random)
    clean = np.asarray(full(q, k, v, packed.fields["rows"], packed.fields["time"], tau, bias))
    of_first = np.concatenate([rows_of(packed, 0, 0, 3, 4), rows_of(packed, 0, 1, 5, 4)])
    others = np.setdiff1d(np.arange(BUCKET.tokens), of_first)
    for array in (q, k, v):
        array[:, others] = np.nan
    out = np.asarray(full(q, k, v, packed.fields["rows"], packed.fields["time"], tau, bias))
    for block, length in enumerate((3, 5)):
        at = rows_of(packed, 0, block, length, 4)
        np.testing.assert_array_equal(out[block, at], clean[block, at])
