"""The demo's driver: it ranks through a server of its own and leaves none behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.server.live import build, environment


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    files = build(folder, ladder=((160, 96),))
    path = folder / "demo.yaml"
    path.write_text(
        f"store: {{path: {files.store}}}\n"
        f"export: {{artifact: {files.artifact}}}\n"
        "server: {port: 0, metrics_port: 0}\n"
    )
    return path


def start(config: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flame_jax.demo", "--config", str(config), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


def test_it_ranks_three_users_and_exits_0(config: Path) -> None:
    out, _ = start(config).communicate(timeout=120)
    assert out.count("best of") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_the_server_and_exits_0(config: Path, number: signal.Signals) -> None:
    demo = start(config, "--keep")
    assert demo.stdout is not None
    metrics = ""
    for line in demo.stdout:
        if line.startswith("READY "):
            metrics = dict(part.split("=", 1) for part in line.split()[1:])["metrics"]
        if line.startswith("serving on"):
            break
    urllib.request.urlopen(f"http://{metrics}/metrics").close()
    demo.send_signal(number)
    assert demo.wait(60) == 0
    demo.stdout.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{metrics}/metrics")
