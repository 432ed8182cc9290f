"""The committed stubs are what `make proto` generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "server/proto").glob("*.proto"))
GENERATED = [f"{source}_{ending}" for source in SOURCES for ending in ("pb2.py", "pb2.pyi", "pb2_grpc.py")]


def test_stubs_are_current(tmp_path: Path) -> None:
    assert SOURCES == ["control", "ranking"]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    sources = [f"flame_jax/server/proto/{source}.proto" for source in SOURCES]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *sources]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in GENERATED:
        fresh = (tmp_path / "flame_jax/server/proto" / name).read_text()
        assert (ROOT / "server/proto" / name).read_text() == fresh, f"{name} is stale: run `make proto`"


def test_string_candidate_keys_keep_their_number() -> None:
    from flame_jax.server.proto import ranking_pb2

    with pytest.raises(KeyError):
        ranking_pb2.RankRequest.DESCRIPTOR.fields_by_number[9]
    assert "reserved 9;" in (ROOT / "server/proto/ranking.proto").read_text()
