from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from flame_jax.client import RankingClient
from tests.server.live import Files, Server, build, serving, with_ladder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return build(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def generations(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Files]:
    """Two models of other weights and ladders."""
    halved = {name: w if name.startswith("columns/") else w / 2 for name, w in files.weights.items()}
    folder = tmp_path_factory.mktemp("generation")
    return files, with_ladder(replace(files, weights=halved), folder, ((160, 96),))


@pytest.fixture(scope="session")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(files, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[RankingClient]:
    with RankingClient(server.target) as client:
        yield client
