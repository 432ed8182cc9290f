"""A reloader over versions that load at once and serve nobody."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from flame_jax.config import ServerConfig
from flame_jax.fke.repository import Version, natural_key
from flame_jax.server.errors import CommandRefused, Refusal
from flame_jax.server.live import LiveModel, LoadError
from flame_jax.server.metrics import Metrics
from flame_jax.server.models import Models
from flame_jax.server.reload import Reloader
from flame_jax.server.state import State, describe


class FakeLive(LiveModel):
    """A version that serves nobody and stops at once."""

    def __init__(self, version: Version) -> None:
        self.version, self.identity = version.name, version.identity
        self.in_flight = self.ok = self.failed = 0
        self.stops = 0
        target = SimpleNamespace(platform="none", device_kind="none")
        self.manifest: Any = SimpleNamespace(
            model=SimpleNamespace(name="m"), version=version.name, target=target, kernels={}
        )
        self.dispatcher: Any = SimpleNamespace(launched={}, queued=0)
        self.page_locks: Any = {None: SimpleNamespace(memory="none")}
        self.lanes = 1
        self.engine: Any = SimpleNamespace(scores_memory="none")
        self.hot = None

    def stop(self, seconds: float) -> bool:
        self.stops += 1
        return True


class Shelf:
    """Versions on a disk that is none, as a source and as a loader.

    Attributes:
        bad: version -> why it can't be loaded.
        loads: every attempt.
        gate: a load waits for it.
        together: most loads that ever ran at once.
    """

    model = "m"

    def __init__(self, *names: str) -> None:
        self.held = dict.fromkeys(names, "first")
        self.bad: dict[str, str] = {}
        self.loads: list[str] = []
        self.beside: list[bool] = []
        self.gate = threading.Event()
        self.gate.set()
        self.together = self._now = 0

    def versions(self, newer_than: str | None = None) -> list[Version]:
        names = sorted(self.held, key=natural_key, reverse=True)
        if newer_than is not None:
            names = [name for name in names if natural_key(name) > natural_key(newer_than)]
        return [Version(name, None, self.held[name]) for name in names]  # type: ignore[arg-type]

    def find(self, name: str) -> Version | None:
        return next((version for version in self.versions() if version.name == name), None)

    def refusal(self, tried: Any) -> str:
        return f"tried {dict(tried)}"

    def load(self, version: Version, model: str, beside: bool) -> LiveModel:
        assert model == "m"
        self._now += 1
        self.together = max(self.together, self._now)
        self.loads.append(version.name)
        self.beside.append(beside)
        assert self.gate.wait(20)
        self._now -= 1
        if version.name in self.bad:
            raise LoadError(self.bad[version.name])
        return FakeLive(version)


class Desk:
    """A reloader over a shelf."""

    def __init__(self, shelf: Shelf, **config: Any) -> None:
        self.shelf, self.models, self.metrics = shelf, Models(), Metrics()
        self.dead = 0
        settings = ServerConfig(models_dir="somewhere", **{"rollback_seconds": 1000.0, **config})
        self.reloader = Reloader(shelf, shelf.load, self.models, self.metrics, settings, self._on_dead)

    def _on_dead(self) -> None:
        self.dead += 1

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def roles(self) -> dict[str, str]:
        return {live.version: str(role) for live, role in self.models if role != "draining"}

    async def state(self) -> State:
        return await describe(self.models, self.reloader)

    async def statuses(self) -> dict[str, str]:
        return {row.version: str(row.status) for row in (await self.state()).versions}

    def fail(self, live: LiveModel, calls: int, ok: int = 0) -> None:
        """Answer some calls well, then fail some, as the service counts them."""
        live.ok += ok
        for _ in range(calls):
            live.failed += 1
            self.reloader.failed(live)


def run(names: Sequence[str], test: Callable[[Desk], Awaitable[None]], **config: Any) -> None:
    async def started() -> None:
        desk = Desk(Shelf(*names), **config)
        await desk.reloader.start()
        await test(desk)

    asyncio.run(asyncio.wait_for(started(), 30))


@contextlib.contextmanager
def refused(code: Refusal) -> Iterator[None]:
    with pytest.raises(CommandRefused) as caught:
        yield
    assert caught.value.code is code
    assert str(caught.value).startswith(f"{code}: ")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.005)
