"""Ranking through a live server, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

from flame_jax.client import Ranking, RankingClient
from flame_jax.request import History
from flame_jax.schema import Feature
from tests.oracles import climber as oracle
from tests.packed import EPOCH
from tests.server.live import ITEMS, KEYS, MODEL, SCHEMA, Files

NOW = EPOCH + 2 * 10**6


def expected(
    files: Files,
    user: str,
    candidates: np.ndarray,
    *,
    history: History | None = None,
    at: int = NOW,
    scenario: int = 0,
    context: dict[str, float | int] | None = None,
    sent: dict[str, list[float] | list[int]] | None = None,
) -> np.ndarray:
    """The oracle's scores, features looked up by plain loops."""
    events = history if history is not None else files.histories.get(user, History.empty())
    blocks = []
    for block in SCHEMA.blocks:
        kept = [
            j
            for j in range(len(events))
            if events.timestamps[j] <= at and (not block.actions or events.actions[j] in block.actions)
        ][-SCHEMA.block_length :]
        rows = np.array([row_of(files, int(events.item_ids[j])) for j in kept], np.int64)
        blocks.append((rows, events.actions[kept], events.timestamps[kept]))
    stored = {int(row["id"]): row for row in files.items}
    columns: dict[str, np.ndarray] = {}
    for f in SCHEMA.item_features:
        values = (
            [stored[int(i)][f.name] if int(i) in stored else f.default for i in candidates]
            if (f.source != "request")
            else (sent or {}).get(f.name, [f.default] * len(candidates))
        )
        columns[f.name] = np.array([as_read("item", f, value) for value in values])
    known = files.user_features.get(user)
    given = {"hour": 0, "speed": 0.0, "campaign": -1, **(context or {})}
    request = oracle.OracleRequest(
        blocks=blocks,
        request_time=at,
        scenario=scenario,
        candidates=np.array([row_of(files, int(i)) for i in candidates]),
        item_features=columns,
        user_features={
            f.name: as_read("user", f, known[f.name].item() if known is not None else f.default)
            for f in SCHEMA.user_features
        },
        context_features={f.name: as_read("context", f, given[f.name]) for f in SCHEMA.context_features},
    )
    return oracle.rank(files.weights, SCHEMA, request, heads=MODEL.heads, head_dim=MODEL.head_dim)


def row_of(files: Files, item: int) -> int:
    return row_among(files.vocabularies.items.keys, item)


def row_among(keys: np.ndarray, key: int) -> int:
    known = sorted(int(k) for k in keys)
    return known.index(key) + 1 if key in known else 0


def as_read(group: str, feature: Feature, value: float) -> float:
    """A stored or sent value as the model reads it."""
    return row_among(KEYS[f"{group}.{feature.name}"], int(value)) if feature.kind == "id" else value


def check(answer: Ranking, scores: np.ndarray) -> None:
    for column, task in enumerate(SCHEMA.tasks):
        np.testing.assert_allclose(answer.scores[task], scores[:, column], rtol=0, atol=1e-5)


@pytest.mark.parametrize("user", ["u0", "u1", "u7", "u29"])
def test_scores_are_the_oracles(client: RankingClient, files: Files, user: str) -> None:
    answer = client.rank(user, ITEMS[3:20], request_time=NOW)
    check(answer, expected(files, user, ITEMS[3:20]))
    assert (answer.model, answer.version) == ("tiny", "7")
    assert not answer.flags["unknown_user"]


def test_a_large_request_is_split_and_comes_back_in_order(client: RankingClient, files: Files) -> None:
    candidates = np.random.default_rng(1).permutation(np.tile(ITEMS, 4))[:700]
    answer = client.rank("u5", candidates, request_time=NOW)
    assert answer.timings_us["batches"] >= 4
    distinct, inverse = np.unique(candidates, return_inverse=True)
    check(answer, expected(files, "u5", distinct)[inverse])


def test_scenario_and_context_reach_the_model(client: RankingClient, files: Files) -> None:
    context = {"hour": 13, "speed": -1.5, "campaign": 2**50}
    answer = client.rank("u3", ITEMS[:9], request_time=NOW, scenario="search", context=context)
    check(answer, expected(files, "u3", ITEMS[:9], scenario=1, context=context))


def test_features_sent_with_the_candidates_reach_the_model(client: RankingClient, files: Files) -> None:
    price, shelf = [0.5 * k - 2 for k in range(9)], [9, 2**33, 5, -1, 9, 9, 2**63 - 1, 2**33, 0]
    answer = client.rank("u3", ITEMS[:9], request_time=NOW, item_features={"price": price, "shelf": shelf})
    check(answer, expected(files, "u3", ITEMS[:9], sent={"price": price, "shelf": shelf}))
    whole = [3, -2, 0, 1, 5, 8, 0, 2, 1]
    answer = client.rank("u3", ITEMS[:9], request_time=NOW, item_features={"price": whole})
    check(answer, expected(files, "u3", ITEMS[:9], sent={"price": whole}))
    answer = client.rank("u3", ITEMS[:9], request_time=NOW, item_features={"shelf": np.array(shelf)})
    check(answer, expected(files, "u3", ITEMS[:9], sent={"shelf": shelf}))


def test_features_sent_stay_with_their_candidates_when_a_request_is_split(client: RankingClient, files: Files) -> None:
    candidates = np.tile(ITEMS, 2)
    price = np.random.default_rng(8).normal(size=len(candidates)).astype(np.float32)
    answer = client.rank("u5", candidates, request_time=NOW, item_features={"price": price})
    assert answer.timings_us["batches"] >= 2
    check(answer, expected(files, "u5", candidates, sent={"price": price.tolist()}))


def test_events_after_the_request_time_are_not_seen(client: RankingClient, files: Files) -> None:
    history = files.histories["u7"]
    at = int(history.timestamps[len(history) // 2])
    check(client.rank("u7", ITEMS[:9], request_time=at), expected(files, "u7", ITEMS[:9], at=at))


def test_an_inline_history_replaces_the_stores(client: RankingClient, files: Files) -> None:
    history = History(ITEMS[[5, 3, 8]], np.array([3, 0, 2], np.int32), np.array([EPOCH, EPOCH, EPOCH + 5]))
    answer = client.rank("u7", ITEMS[:9], request_time=NOW, history=history)
    check(answer, expected(files, "u7", ITEMS[:9], history=history))
    cold = client.rank("u7", ITEMS[:9], request_time=NOW, history=History.empty())
    check(cold, expected(files, "u7", ITEMS[:9], history=History.empty()))
    assert not cold.flags["unknown_user"]


def test_a_history_over_the_models_maximum_keeps_the_newest(client: RankingClient, files: Files) -> None:
    random = np.random.default_rng(2)
    times = EPOCH + np.arange(5000)
    history = History(random.choice(ITEMS, 5000), random.integers(0, 4, 5000).astype(np.int32), times)
    answer = client.rank("u7", ITEMS[:9], request_time=NOW, history=history)
    check(answer, expected(files, "u7", ITEMS[:9], history=history))
    assert answer.flags["truncated_history"]


def test_an_unknown_user_is_scored_cold_and_flagged(client: RankingClient, files: Files) -> None:
    answer = client.rank("nobody", ITEMS[:9], request_time=NOW)
    assert answer.flags["unknown_user"]
    check(answer, expected(files, "nobody", ITEMS[:9]))


@pytest.mark.parametrize("item", [0, 10, 250, 2**31 + 6, 2**32 + 3, 2**63 - 1])
def test_an_unknown_item_is_scored_out_of_vocabulary_and_counted(
    client: RankingClient, files: Files, item: int
) -> None:
    candidates = np.array([item, 3, item, 2**31 + 7], np.int64)
    answer = client.rank("u4", candidates, request_time=NOW)
    assert answer.flags["unknown_items"] == 2
    assert answer.flags["missing_items"] == (0 if item == 10 else 2)
    check(answer, expected(files, "u4", candidates))


def test_duplicates_score_the_same_bits(client: RankingClient) -> None:
    scores = client.rank("u4", [3, 5, 3, 3, 7, 5], request_time=NOW).scores["like"]
    assert scores[0] == scores[2] == scores[3]
    assert scores[1] == scores[5]


def test_tasks_are_answered_in_the_order_asked(client: RankingClient) -> None:
    both = client.rank("u4", ITEMS[:9], request_time=NOW)
    assert list(both.scores) == ["like", "share"]
    swapped = client.rank("u4", ITEMS[:9], request_time=NOW, tasks=["share"], top_k=3)
    assert list(swapped.scores) == ["share"]
    order = np.argsort(-both.scores["share"], kind="stable")[:3]
    assert swapped.top_ids.tolist() == ITEMS[:9][order].tolist()
    np.testing.assert_array_equal(swapped.top_scores, both.scores["share"][order])


def test_top_k_beyond_the_candidates_names_them_all(client: RankingClient) -> None:
    answer = client.rank("u4", ITEMS[:9], request_time=NOW, top_k=100)
    assert sorted(answer.top_ids.tolist()) == ITEMS[:9].tolist()
    assert (np.diff(answer.top_scores) <= 0).all()


def test_the_request_id_comes_back_and_may_repeat(client: RankingClient) -> None:
    for _ in range(2):
        assert client.rank("u4", [3], request_time=NOW, request_id="again").request_id == "again"


def test_stage_timings_are_reported(client: RankingClient) -> None:
    timings = client.rank("u4", ITEMS, request_time=NOW).timings_us
    assert timings["compute_us"] > 0
    assert timings["total_us"] >= timings["decode_us"] + timings["features_us"]
