"""SUMI attention on packed batches against the float64 oracles, every implementation alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.packing import REQUEST_TIME, Bucket, Layout
from flame_jax.pallas_kernels.sumi_attention import mosaic
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Tiling
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Silu, Softmax, TableBias
from flame_jax.schema import Block, FeatureSchema
from tests.oracles import climber as oracle
from tests.oracles import hstu
from tests.packed import Packed, pack, random_request

WINDOW, HEADS = 96, 2
SCHEMA = FeatureSchema(scenarios=("a", "b"), blocks=(Block("x"), Block("y")), block_length=WINDOW)
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Attention = Callable[..., jax.Array]


def rows_of(packed: Packed, request: int, length: int, count: int) -> np.ndarray:
    where = packed.places[request]
    history = np.arange(where.history_start, where.history_start + length)
    return np.concatenate([history, np.arange(where.candidate_start, where.candidate_start + count)])


def weights(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(SCHEMA.blocks), len(SCHEMA.scenarios), HEADS)
    return random.normal(size=shape).astype(np.float32), (0.1 * random.normal(size=(*shape, 3))).astype(np.float32)


class SumiAttentionCases:
    """What holds of every implementation; a subclass says which, on what sizes, and how exactly."""

    attention: ClassVar[Attention]
    dim: ClassVar[int]
    layout: ClassVar[Layout]
    bucket: ClassVar[Bucket]
    dtype: ClassVar[Any]
    tolerance: ClassVar[float]

    def qkv(self, random: np.random.Generator) -> Arrays:
        """Numbers that the dtype holds exactly."""
        shape = (3, len(SCHEMA.blocks), self.bucket.tokens, HEADS, self.dim)
        q, k, v = np.asarray(random.normal(size=shape), self.dtype).astype(np.float32)
        return q, k, v

    def run(
        self,
        arrays: Arrays,
        rows: np.ndarray,
        time: np.ndarray,
        tau: np.ndarray,
        coefficients: np.ndarray | None,
        **changed: Any,
    ) -> np.ndarray:
        activation = Softmax(jax.nn.softplus(jnp.asarray(tau)))
        bias = None if coefficients is None else LogBias(jnp.asarray(coefficients))
        q, k, v = (jnp.asarray(x, self.dtype) for x in arrays)
        settings = {"activation": activation, "bias": bias, "causal": False, "align": self.layout.align} | changed
        out = type(self).attention(q, k, v, jnp.asarray(rows), jnp.asarray(time), **settings)
        return np.asarray(out, np.float32)

    def packed(self, shapes: list[tuple[int, int, int]], random: np.random.Generator) -> tuple[list[Any], Packed]:
        """Requests of these lengths (both blocks' history, candidates) amid leftovers of an earlier batch."""
        requests = [random_request(SCHEMA, random, lengths=[a, b], candidates=c, rows=10) for a, b, c in shapes]
        return requests, pack(SCHEMA, self.layout, self.bucket, requests, dirt=random)

    def check(self, shapes: list[tuple[int, int, int]], seed: int) -> None:
        """Every row of every request against the oracle."""
        random = np.random.default_rng(seed)
        requests, packed = self.packed(shapes, random)
        q, k, v = self.qkv(random)
        tau, bias = weights(random)
        out = self.run((q, k, v), packed.fields["rows"], packed.fields["time"], tau, bias)
        assert np.isfinite(out).all()
        for number, request in enumerate(requests):
            for block, (items, _, times) in enumerate(request.blocks):
                at = rows_of(packed, number, len(items), len(request.candidates))
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
                    np.testing.assert_allclose(out[block, at, head], expected, rtol=0, atol=self.tolerance)

    def test_silu_attention_with_a_causal_history(self) -> None:
        random = np.random.default_rng(8)
        requests, packed = self.packed([(90, 70, 5), (0, 3, 20)], random)
        arrays, (tau, _) = self.qkv(random), weights(random)
        out = self.run(
            arrays,
            packed.fields["rows"],
            packed.fields["time"],
            tau,
            None,
            activation=Silu(0.3, 64.0),
            causal=True,
        )
        for number, request in enumerate(requests):
            for block, (items, *_) in enumerate(request.blocks):
                at = rows_of(packed, number, len(items), len(request.candidates))
                for head in range(HEADS):
                    q, k, v = (x[block, at, head] for x in arrays)
                    expected = hstu.attention(q, k, v, history=len(items), scale=0.3, divisor=64.0)
                    np.testing.assert_allclose(out[block, at, head], expected, rtol=0, atol=self.tolerance)

    def test_a_request_alone_and_among_others_has_the_same_bits(self) -> None:
        random = np.random.default_rng(3)
        ours = random_request(SCHEMA, random, lengths=[70, 7], candidates=11, rows=10)
        others = [random_request(SCHEMA, random, lengths=[9, 24], candidates=13, rows=10) for _ in range(2)]
        tau, bias = weights(random)
        own = self.qkv(random)
        results = []
        for requests, position in (([ours], 0), ([others[0], ours, others[1]], 1), ([*others, ours], 2)):
            packed = pack(SCHEMA, self.layout, self.bucket, requests, dirt=random)
            noise = self.qkv(random)
            at = rows_of(packed, position, 70, 11)
            for mine, theirs in zip(own, noise, strict=True):
                theirs[:, at] = mine[:, : len(at)]
            results.append(self.run(noise, packed.fields["rows"], packed.fields["time"], tau, bias)[0, at])
        assert np.array_equal(results[0], results[1])
        assert np.array_equal(results[0], results[2])

    def test_candidate_rows_alone_equal_the_last_rows_of_all(self) -> None:
        random = np.random.default_rng(4)
        _, packed = self.packed([(5, 16, 9), (70, 16, 9), (5, 80, 30)], random)
        (q, k, v), (tau, bias) = self.qkv(random), weights(random)
        rows, time = packed.fields["rows"], packed.fields["time"]
        whole = self.run((q, k, v), rows, time, tau, bias)
        tail = self.run((q[:, -self.bucket.candidates :], k, v), rows, time, tau, bias)
        np.testing.assert_allclose(tail, whole[:, -self.bucket.candidates :], rtol=0, atol=self.tolerance / 10)

    def test_an_empty_slot_is_finite(self) -> None:
        random = np.random.default_rng(5)
        rows = np.zeros((self.layout.max_requests, 5 + len(SCHEMA.blocks)), np.int32)
        time = np.zeros((2, self.bucket.tokens), np.int32)
        assert np.isfinite(self.run(self.qkv(random), rows, time, *weights(random))).all()

    def test_times_of_seventy_years_apart_do_not_overflow(self) -> None:
        random = np.random.default_rng(6)
        (request,), packed = self.packed([(2, 2, 1)], random)
        q, k, v = self.qkv(random)
        tau, _ = weights(random)
        bias = np.zeros((*tau.shape, 3), np.float32)
        bias[..., 1] = -1.0
        time, rows = packed.fields["time"], packed.fields["rows"]
        at = rows_of(packed, 0, 2, 1)
        time[:, at] = (0, 2**31 - 1, 2**31 - 1)
        rows[0, REQUEST_TIME] = 2**31 - 1
        out = self.run((q, k, v), rows, time, tau, bias)
        expected = oracle.sumi_attention(
            *(x[0, at, 0] for x in (q, k, v)),
            history_length=2,
            history_times=np.array([0, 2**31 - 1]),
            request_time=2**31 - 1,
            alpha=0.0,
            beta=-1.0,
            gamma=0.0,
            tau=float(tau[0, request.scenario, 0]),
        )
        np.testing.assert_allclose(out[0, at, 0], expected, rtol=0, atol=self.tolerance)

    def test_a_neighbours_nan_stays_with_the_neighbour(self) -> None:
        random = np.random.default_rng(0)
        _, packed = self.packed([(70, 5, 4), (3, 5, 4)], random)
        arrays, (tau, bias) = self.qkv(random), weights(random)
        rows, time = packed.fields["rows"], packed.fields["time"]
        clean = self.run(arrays, rows, time, tau, bias)
        # A block's rows beyond its own history are nobody's, too.
        for block, length in enumerate((70, 5)):
            at = rows_of(packed, 0, length, 4)
            others = np.setdiff1d(np.arange(self.bucket.tokens), at)
            for array in arrays:
                array[block, others] = np.nan
        out = self.run(arrays, rows, time, tau, bias)
        for block, length in enumerate((70, 5)):
            at = rows_of(packed, 0, length, 4)
            np.testing.assert_array_equal(out[block, at], clean[block, at])


shapes = st.lists(
    st.tuples(st.integers(0, 24), st.integers(0, 24), st.integers(1, 20)), min_size=1, max_size=3
)  # history of both blocks, candidates


class TestReference(SumiAttentionCases):
    """In float32, by XLA."""

    attention = staticmethod(jax.jit(partial(sumi_attention, window=WINDOW), static_argnames=("causal", "align")))
    dim, layout, bucket, dtype, tolerance = 8, Layout(align=8, max_requests=5), Bucket(320, 96), np.float32, 5e-5

    @settings(max_examples=25)
    @given(shapes=shapes, seed=st.integers(0, 2**32 - 1))
    def test_every_request_matches_the_oracle_whatever_its_neighbours(
        self, shapes: list[tuple[int, int, int]], seed: int
    ) -> None:
        self.check(shapes, seed)

    def test_rows_off_the_alignment_are_refused(self) -> None:
        x, time = jnp.zeros((1, 12, 1, 4)), jnp.zeros((1, 12), jnp.int32)
        with pytest.raises(ValueError, match="multiples of 8"):
            sumi_attention(
                x, x, x, jnp.zeros((1, 6), jnp.int32), time, activation=Softmax(jnp.ones((1, 1, 1))), align=8, window=8
            )


class TestMosaicInterpreted(SumiAttentionCases):
    """The Hopper kernel, in bfloat16, by Pallas' interpreter."""

    attention = staticmethod(partial(mosaic.sumi_attention, interpret=True))
    dim, layout, bucket, dtype, tolerance = 32, Layout(align=16, max_requests=5), Bucket(352, 160), jnp.bfloat16, 0.03

    @pytest.mark.parametrize(
        "shapes",
        [[(0, 0, 1)], [(90, 20, 5), (0, 3, 96), (64, 64, 16)], [(1, 30, 70), (17, 0, 1), (0, 0, 40), (65, 96, 2)]],
    )
    def test_every_request_matches_the_oracle_whatever_its_neighbours(self, shapes: list[tuple[int, int, int]]) -> None:
        self.check(shapes, seed=len(shapes))

    @pytest.mark.parametrize("tiling", [Tiling(3, 64, 2, 1), Tiling(2, 128, 2, 2)], ids=str)
    def test_other_block_sizes_match_the_oracle_too(self, tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
        attention = staticmethod(partial(mosaic.sumi_attention, interpret=True, tiling=tiling))
        monkeypatch.setattr(TestMosaicInterpreted, "attention", attention)
        self.check([(90, 0, 5), (0, 3, 90), (64, 64, 16)], seed=11)

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"dtype": jnp.float32}, "dtype float32"),
            ({"v_dim": 48}, "64 and 48 dimensions"),
            ({"align": 8}, "alignment of 8"),
            ({"bias": TableBias}, "no gather"),
        ],
    )
    def test_what_it_can_not_do_is_said(self, changed: dict[str, Any], reason: str) -> None:
        able = {"dtype": jnp.bfloat16, "qk_dim": 64, "v_dim": 64, "align": 16, "bias": LogBias}
        assert not mosaic.misfit(**able)
        assert reason in mosaic.misfit(**able | changed)
