"""A server with lanes: the same bits, wherever a batch runs, and a metric that says how many there are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flame_jax.client import RankingClient
from tests.server.live import ITEMS, Files, serving
from tests.server.test_rank import NOW


def test_a_server_on_two_devices_with_two_lanes_each_answers_as_one_does(
    generations: tuple[Files, Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = generations[1]  # of one bucket: equal bits are promised within one executable

    def bits(client: RankingClient, user: int) -> bytes:
        scores = client.rank(f"u{user}", ITEMS[user : user + 60], request_time=NOW).scores["like"]
        return np.asarray(scores).tobytes()

    with serving(files, tmp_path / "log") as server, RankingClient(server.target) as client:
        right = [bits(client, user) for user in range(20)]
        assert len(set(right)) == 20
        assert server.metric("flame_model_info", lanes="1") == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    flags = ("--dispatch.devices", "2", "--dispatch.lanes", "2")
    with serving(files, tmp_path / "log", *flags) as server, RankingClient(server.target) as client:
        with ThreadPoolExecutor(8) as callers:
            for _ in range(3):
                assert [*callers.map(lambda user: bits(client, user), range(20))] == right
        assert server.metric("flame_model_info", lanes="4") == 1
        assert server.metric("flame_compiles_after_ready_total") == 0
