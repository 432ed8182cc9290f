from __future__ import annotations

from collections.abc import Iterator

import pytest

from flame_jax.client import RankingClient
from tests.server.live import Files, Server, build, serving


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return build(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(files, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[RankingClient]:
    with RankingClient(server.target) as client:
        yield client
