"""Score invariance through a real server: a pair scores the same alone, batched, split, in any order or bucket."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.client import RankingClient
from tests.packed import EPOCH
from tests.server.live import ITEMS, SCHEMA, USERS, Files, Server, serving, with_ladder

NOW = EPOCH + 2 * 10**6

Call = tuple[int, list[int], bool]
"""User, positions in ITEMS (any order, repeats allowed), scenario."""

calls = st.lists(
    st.tuples(
        st.integers(0, USERS - 1), st.lists(st.integers(0, len(ITEMS) - 1), min_size=1, max_size=150), st.booleans()
    ),
    min_size=1,
    max_size=8,
)


class Bench:
    """A server, and the scores each pair gets when it is all that is asked."""

    def __init__(self, client: RankingClient) -> None:
        self._client = client
        self._alone: dict[tuple[int, int, bool], np.ndarray] = {}
        self._pool = ThreadPoolExecutor(8)

    def rank(self, call: Call) -> np.ndarray:
        user, positions, search = call
        scenario = "search" if search else "home"
        answer = self._client.rank(f"u{user}", ITEMS[positions], request_time=NOW, scenario=scenario)
        return np.stack([answer.scores[task] for task in SCHEMA.tasks], axis=1)

    def together(self, calls: list[Call]) -> list[np.ndarray]:
        return list(self._pool.map(self.rank, calls))

    def alone(self, call: Call) -> np.ndarray:
        user, positions, search = call
        for position in positions:
            if (user, position, search) not in self._alone:
                self._alone[user, position, search] = self.rank((user, [position], search))[0]
        return np.stack([self._alone[user, position, search] for position in positions])


@pytest.fixture(scope="module")
def one_bucket(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("one")
    with serving(with_ladder(files, folder, ((160, 96),)), folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def same_executable(one_bucket: Server) -> Iterator[Bench]:
    with RankingClient(one_bucket.target) as client:
        yield Bench(client)


@pytest.fixture(scope="module")
def any_bucket(server: Server) -> Iterator[Bench]:
    with RankingClient(server.target) as client:
        yield Bench(client)


@settings(max_examples=40)
@given(calls=calls)
def test_within_one_executable_scores_are_equal_to_the_bit(same_executable: Bench, calls: list[Call]) -> None:
    for call, scores in zip(calls, same_executable.together(calls), strict=True):
        assert np.array_equal(scores, same_executable.alone(call))


def test_the_property_saw_batches_and_splits(same_executable: Bench, one_bucket: Server) -> None:
    """Without this the property above could hold for want of company."""
    before = one_bucket.metric("flame_batches_total")
    same_executable.together([(n, [1, 2, 3], False) for n in range(8)] * 20)
    batched = one_bucket.metric("flame_batches_total") - before
    assert batched < 160
    before = one_bucket.metric("flame_batches_total")
    same_executable.rank((3, list(range(150)), False))
    assert one_bucket.metric("flame_batches_total") - before >= 2


@settings(max_examples=30)
@given(calls=calls)
def test_across_buckets_probabilities_agree_within_1e_5(
    any_bucket: Bench, same_executable: Bench, calls: list[Call]
) -> None:
    for call, scores in zip(calls, any_bucket.together(calls), strict=True):
        np.testing.assert_allclose(scores, same_executable.alone(call), rtol=0, atol=1e-5)
