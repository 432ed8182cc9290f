"""SUMI attention of candidates with a history in pages: float64 oracles, neighbours, and the packed form of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flame_jax.packing import Bucket, Layout
from flame_jax.pallas_kernels.sumi_attention import mosaic
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.mosaic_form import Tiling
from flame_jax.pallas_kernels.sumi_attention.types import LogBias, Pages, Silu, Softmax
from tests.oracles import climber as oracle
from tests.oracles import hstu
from tests.paged import Ask, Batch, Maker, packed, paged

WINDOW, HEADS, PAGES = 192, 2, 9
SILU = Silu(0.3, 64.0)


def pages_of(batch: Batch) -> Any:
    return None if batch.pool is None else Pages(*batch.pool)  # type: ignore[arg-type]


def history_of(batch: Batch, request: int, block: int) -> tuple[np.ndarray, ...]:
    """Keys, values and times, row by row as the table says."""
    assert batch.pool is not None
    k, v, table, time = batch.pool
    length, page_rows = batch.rows[request, 5 + block], k.shape[2]
    at = [(block, table[request, j // page_rows], j % page_rows) for j in range(length)]
    empty = np.zeros((0, *k.shape[3:]), k.dtype), np.zeros((0, *v.shape[3:]), v.dtype), np.zeros(0, np.int32)
    return tuple(np.stack([x[i] for i in at]) if at else none for x, none in zip((k, v, time), empty, strict=True))


class PagedCases:
    """What holds of every implementation; a subclass says which, on what sizes, and how exactly."""

    attention: ClassVar[Callable[..., jax.Array]]
    dim: ClassVar[int]
    layout: ClassVar[Layout]
    bucket: ClassVar[Bucket]
    dtype: ClassVar[Any]
    tolerance: ClassVar[float]

    def maker(self, seed: int) -> Maker:
        return Maker(np.random.default_rng(seed), heads=HEADS, dim=self.dim, dtype=self.dtype)

    def paged(self, asks: list[Ask], seed: int, page_rows: int = 64) -> Batch:
        random = np.random.default_rng(seed)
        return paged(asks, self.bucket, self.layout, page_rows=page_rows, pages=PAGES, random=random)

    def weights(self, blocks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Temperatures before softplus, and coefficients of the bias."""
        random, shape = np.random.default_rng(seed), (blocks, 2, HEADS)
        return random.normal(size=shape).astype(np.float32), (0.1 * random.normal(size=(*shape, 3))).astype(np.float32)

    def run(self, batch: Batch, tau: np.ndarray | None = None, bias: np.ndarray | None = None, **more: Any) -> Any:
        """Of the candidate rows, those of requests; SiLU unless there is a temperature."""

        @jax.jit
        def attend(arrays: list[np.ndarray], tau: Any, bias: Any, history: Pages | None) -> jax.Array:
            return type(self).attention(
                *arrays,
                activation=SILU if tau is None else Softmax(jax.nn.softplus(tau)),
                bias=None if bias is None else LogBias(bias),
                causal=tau is None,
                align=self.layout.align,
                history=history,
                **more,
            )

        q, k, v = batch.arrays
        out = attend([q[:, -self.bucket.candidates :], k, v, batch.rows, batch.time], tau, bias, pages_of(batch))
        first = batch.time.shape[1] - self.bucket.candidates
        starts = [where.candidate_start - first for where in batch.places]
        rows = zip(starts, batch.rows[:, 2], strict=False)
        return [np.asarray(out[:, start : start + count], np.float32) for start, count in rows]

    def check(
        self, asks: list[Ask], tau: np.ndarray | None, bias: np.ndarray | None, page_rows: int = 64, **more: Any
    ) -> None:
        """Every candidate of every request against the oracle."""
        batch = self.paged(asks, 1, page_rows)
        for number, (ask, out) in enumerate(zip(asks, self.run(batch, tau, bias, **more), strict=True)):
            for block, length in enumerate(ask.user.lengths):
                k, v, time = history_of(batch, number, block)
                for head in range(HEADS):
                    rows = [np.zeros_like(k), ask.q[block]], [k, ask.k[block]], [v, ask.v[block]]
                    one = [np.concatenate(x)[:, head].astype(np.float64) for x in rows]
                    if tau is None:
                        expected = hstu.attention(*one, history=length, scale=SILU.scale, divisor=SILU.divisor)
                    else:
                        own = (0.0, 0.0, 0.0) if bias is None else bias[block, ask.scenario, head]
                        expected = oracle.sumi_attention(
                            *one,
                            history_length=length,
                            history_times=time,
                            request_time=ask.time,
                            tau=tau[block, ask.scenario, head],
                            **dict(zip(("alpha", "beta", "gamma"), own, strict=True)),
                        )
                    np.testing.assert_allclose(out[block, :, head], expected[length:], rtol=0, atol=self.tolerance)

    def test_softmax_with_a_bias_matches_the_oracle(self) -> None:
        maker = self.maker(0)
        twice, new = maker.user(66, 9), maker.user(0, 0)
        asks = [maker.ask(user, count) for user, count in ((twice, 5), (new, 20), (twice, 17))]
        self.check(asks, *self.weights(2, seed=2))

    def test_silu_with_two_steps_a_page_matches_the_oracle(self) -> None:
        maker = self.maker(3)
        self.check([maker.ask(maker.user(n), c) for n, c in ((190, 70), (1, 3))], None, None, page_rows=128)

    def test_bits_depend_on_neither_neighbours_nor_pages_and_are_those_of_packed_rows(self) -> None:
        maker = self.maker(4)
        ours = maker.ask(maker.user(70), 20)
        others = [maker.ask(maker.user(9), 13), maker.ask(ours.user, 3)]
        weights = self.weights(1, seed=5)
        alone = self.run(packed([ours], self.bucket, self.layout), *weights)[0]
        assert np.isfinite(alone).all()
        assert np.array_equal(alone, self.run(self.paged([others[0], ours, others[1]], seed=7), *weights)[1])


class TestReference(PagedCases):
    """In float32, by XLA."""

    attention = staticmethod(partial(sumi_attention, window=WINDOW))
    dim, layout, bucket, dtype, tolerance = 8, Layout(align=8, max_requests=5), Bucket(320, 96), np.float32, 5e-5

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"page_rows": 48}, "page of 48 rows is no multiple of 64"),
            ({"rows": 32}, "32 token rows are the 16 query rows"),
            ({"time": None}, "its pages have none"),
        ],
    )
    @pytest.mark.parametrize("implementation", ["xla", "mosaic"])
    def test_pages_that_do_not_fit_are_refused(self, changed: dict[str, Any], reason: str, implementation: Any) -> None:
        about: dict[str, Any] = {"page_rows": 64, "rows": 16, "time": jnp.zeros((1, 2, 64), jnp.int32)} | changed
        pool = jnp.zeros((1, 2, about["page_rows"], 1, 32))
        history = Pages(pool, pool, jnp.zeros((1, 1), jnp.int32), about["time"])
        q, k = (jnp.zeros((1, n, 1, 32), jnp.bfloat16) for n in (16, about["rows"]))
        with pytest.raises(ValueError, match=reason):
            sumi_attention(
                *(q, k, k, jnp.zeros((1, 6), jnp.int32), jnp.zeros((1, about["rows"]), jnp.int32)),
                activation=Softmax(jnp.ones((1, 1, 1))),
                bias=LogBias(jnp.ones((1, 1, 1, 3))),
                align=16,
                window=64,
                history=history,
                implementation=implementation,
            )


class TestMosaicInterpreted(PagedCases):
    """The Hopper kernel, in bfloat16, by Pallas' interpreter."""

    attention = staticmethod(partial(mosaic.sumi_attention, interpret=True, tiling=Tiling(warpgroups=1)))
    dim, layout, bucket, dtype, tolerance = 32, Layout(align=16, max_requests=4), Bucket(176, 96), jnp.bfloat16, 0.03

    def test_other_block_sizes_match_the_oracle_too(self) -> None:
        maker = self.maker(8)
        tau, bias = self.weights(1, seed=9)
        self.check([maker.ask(maker.user(150), 30)], tau, bias, page_rows=128, tiling=Tiling(2, 128, 2, 1))

    def test_a_step_over_two_pages_is_refused(self) -> None:
        maker = self.maker(10)
        with pytest.raises(ValueError, match="a page of 64 rows is no steps of 128 keys"):
            self.run(self.paged([maker.ask(maker.user(3), 2)], seed=1), tiling=Tiling(1, 128))
