"""A server process to measure."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[dict[str, str]]:
    """Run a server on free ports; what its READY line says. Exits with its status if it ends before that line."""
    command = [sys.executable, "-m", "flame_jax.server", *flags, "--server.port", "0", "--server.metrics_port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        if not ready:
            sys.exit(server.wait() or 1)
        yield dict(part.split("=", 1) for part in ready.split()[1:])
    finally:
        server.terminate()
        server.wait()


def scrape(about: dict[str, str]) -> dict[str, float]:
    """Every metric of a server by its name and labels."""
    with urllib.request.urlopen(f"http://{about['metrics']}/metrics") as page:
        lines = [line for line in page.read().decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
