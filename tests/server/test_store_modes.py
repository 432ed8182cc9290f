"""A live server on a real Valkey: the modes of the cache, and what calls get when the store goes away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from bench.pda import servers
from flame_jax.client import RankingClient
from tests.server.live import ITEMS, Files, serving, to_end
from tests.server.test_rank import NOW, check, expected

RECOVERY_SECONDS = 2.0


@pytest.fixture
def valkey(tmp_path: Path, files: Files) -> Iterator[servers.Server]:
    with servers.running(tmp_path) as server:
        server.fill(files.store)
        yield server


def flags(server: servers.Server, mode: str) -> list[str]:
    return ["--store.url", server.url, "--cache.mode", mode, "--store.timeout_ms", "100"]


def settled(client: RankingClient, user: str, candidates: np.ndarray, seconds: float) -> float:
    """Seconds until a call is answered from whole features."""
    begun = time.monotonic()
    while True:
        try:
            if not client.rank(user, candidates, request_time=NOW).flags["degraded"]:
                return time.monotonic() - begun
        except grpc.RpcError:
            pass
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)


@pytest.mark.parametrize("mode", ["off", "sync", "async"])
def test_scores_are_the_oracles_in_every_mode(valkey: servers.Server, files: Files, tmp_path: Path, mode: str) -> None:
    log = tmp_path / "server.log"
    with serving(files, log, *flags(valkey, mode)) as server, RankingClient(server.target) as client:
        for user in ("u1", "u7", "u29", "nobody"):
            for candidates in (ITEMS[3:20], np.array([5, 77777, 5, 8], np.int64)):
                settled(client, user, candidates, 10.0)
                answer = client.rank(user, candidates, request_time=NOW)
                check(answer, expected(files, user, candidates))
                assert answer.flags["missing_items"] == (77777 in candidates)
                assert answer.flags["unknown_user"] == (user == "nobody")
        assert server.metric("flame_accepted_total") == server.metric("flame_finished_total")
        if mode != "off":
            assert server.metric("flame_cache_lookups_total", result="hit") > 0
            assert server.metric("flame_cache_bytes") > 0
        assert (server.metric("flame_finished_total", outcome="degraded") > 0) == (mode == "async")


def test_in_async_calls_go_on_without_the_store_and_say_so(
    valkey: servers.Server, files: Files, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with serving(files, log, *flags(valkey, "async")) as server, RankingClient(server.target) as client:
        settled(client, "u7", ITEMS[:9], 10.0)
        valkey.stop()
        seconds = []
        for _ in range(100):
            begun = time.monotonic()
            answer = client.rank("u7", ITEMS[:9], request_time=NOW)
            seconds.append(time.monotonic() - begun)
            assert answer.flags["degraded"]
            assert not answer.flags["unknown_user"]
            check(answer, expected(files, "nobody", ITEMS[:9]))
        assert sorted(seconds)[90] < 0.1
        valkey.start()
        valkey.fill(files.store)
        settled(client, "u7", ITEMS[:9], RECOVERY_SECONDS)
        check(client.rank("u7", ITEMS[:9], request_time=NOW), expected(files, "u7", ITEMS[:9]))
        assert server.metric("flame_accepted_total") == server.metric("flame_finished_total")
    said = [line for line in log.read_text().splitlines() if "redis_store" in line]
    assert len(said) == 2, "when the store goes down, and when it is back"


def test_in_sync_calls_fail_at_once_without_the_store(valkey: servers.Server, files: Files, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with serving(files, log, *flags(valkey, "sync")) as server, RankingClient(server.target) as client:
        client.rank("u7", ITEMS[:9], request_time=NOW)
        valkey.stop()
        for _ in range(30):
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as error:
                client.rank("u7", ITEMS[:9], request_time=NOW)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - begun < 0.5
        valkey.start()
        valkey.fill(files.store)
        settled(client, "u7", ITEMS[:9], RECOVERY_SECONDS)
    assert "Traceback" not in log.read_text()


def test_without_a_store_the_server_does_not_start_and_keeps_the_password(files: Files) -> None:
    url = f"redis://:s3cret@127.0.0.1:{servers.free_port()}"
    done = to_end(*files.flags(), "--store.url", url, "--server.port", "0")
    assert done.returncode == 1
    assert "store redis://127.0.0.1" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
