"""An artifact's whole life through its commands: build, inspect, verify, serve, reload, roll back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from flame_jax.client import RankingClient
from tests import tiny
from tests.server.live import environment, running, until

USER, ITEMS = "u03", tiny.ITEM_IDS[:10]


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_inspect_verify_serve_reload_roll_back(tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "store")
    models = tmp_path / "models" / tiny.MODEL.name
    for version in ("1", "2"):
        tiny.save_checkpoint(tmp_path / f"checkpoint{version}", int(version))
    config = tiny.write_config(dataclasses.replace(tiny.config(tmp_path), layout=tiny.LAYOUT), tmp_path / "c.yaml")

    def build(version: str) -> None:
        checkpoint, out = str(tmp_path / f"checkpoint{version}"), str(models / version)
        flags = ["--config", config, "--checkpoint", checkpoint, "--out", out, "--export.version", version]
        assert f"version {version}, 2 buckets" in run("flame_jax.export", "build", *flags)

    build("1")
    assert "version 1" in run("flame_jax.export", "inspect", str(models / "1"))
    assert json.loads(run("flame_jax.export", "verify", str(models / "1"), "--json"))["failed"] == []

    ports = [f"--server.{name}=0" for name in ("port", "metrics_port", "admin_port")]
    # Its choice of a bucket hangs on no measured time: another bucket's scores differ in their last bits.
    policy = "--dispatch.policy=descending"
    flags = [
        "--config",
        config,
        policy,
        f"--server.models_dir={tmp_path / 'models'}",
        "--server.poll_seconds=0.1",
        *ports,
    ]
    with running(tmp_path / "log", *flags) as server:
        assert server.about["version"] == "1"
        with RankingClient(server.target) as client:
            first = client.rank(USER, ITEMS).scores["like"]
            build("2")
            until(lambda: client.rank(USER, ITEMS).version == "2")
            second = client.rank(USER, ITEMS).scores["like"]
            assert abs(first - second).max() > 1e-3
            state = run("flame_jax.client", "models", "rollback", "--admin", server.about["admin"], "--json")
            assert {row["version"]: row["status"] for row in json.loads(state)["versions"]}["1"] == "active"
            back = client.rank(USER, ITEMS)
            assert back.version == "1"
            assert back.scores["like"].tobytes() == first.tobytes()
        assert server.metric("flame_compiles_after_ready_total") == 0
