"""One version in this process: what it refuses, how it fails, and that it leaves nothing on the device."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import weakref
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import grpc
import jax
import numpy as np
import pytest

from flame_jax.config import Config, ServerConfig
from flame_jax.fke.engine import Engine
from flame_jax.fke.repository import Repository, Version
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.query import FeatureQuery
from flame_jax.server.errors import Fault
from flame_jax.server.live import LiveModel, Loader, LoadError
from flame_jax.server.metrics import Metrics
from flame_jax.server.models import Models
from flame_jax.server.proto import ranking_pb2
from flame_jax.server.ranking import RankingService
from flame_jax.server.reload import Reloader
from tests import tiny

MESSAGE = ranking_pb2.RankRequest(
    user="u03", candidate_ids=tiny.ITEM_IDS[:5].astype("<i8").tobytes(), request_time=2 * 10**9
).SerializeToString()
CONFIG = Config(server=ServerConfig(models_dir="models", rollback_seconds=1000.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for version in ("1", "2"):
        tiny.save_artifact(root / "climber" / version, version=version)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LmdbStore]:
    path = tmp_path_factory.mktemp("live") / "store"
    tiny.write_store(path)
    store = LmdbStore(path)
    yield store
    store.close()


def on_device() -> int:
    """Bytes of every live array."""
    arrays: list[jax.Array] = jax.live_arrays()  # type: ignore[no-untyped-call]
    return sum(array.size * array.dtype.itemsize for array in arrays)


class Context:
    """A call's context."""

    def time_remaining(self) -> float:
        return 20.0

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise grpc.aio.AbortError(details)


class Desk:
    """A service over a repository in this process, with versions that can be made to fail.

    Attributes:
        spoil: version -> what to do to a fresh engine.
        dead: how often the process would have ended.
    """

    def __init__(self, root: Path, store: LmdbStore, spoil: dict[str, Callable[[Engine], None]]) -> None:
        self.models, self.metrics, self.dead = Models(), Metrics(), 0
        self._store, self._spoil, self._loop = store, spoil, asyncio.get_running_loop()
        self.reloader = Reloader(
            Repository(root), self._load, self.models, self.metrics, replace(CONFIG.server, version="1"), self._on_dead
        )
        self.service = RankingService(
            model="climber",
            models=self.models,
            config=CONFIG.server,
            query=FeatureQuery(store, CONFIG.cache),
            metrics=self.metrics,
            on_failed=self.reloader.failed,
        )

    def _load(self, version: Version, model: str, beside: bool) -> LiveModel:
        loader = Loader(
            config=CONFIG,
            store=self._store,
            trusted=None,
            devices=[tiny.device()],
            loop=self._loop,
            on_fatal=lambda live: self.reloader.died(live),
        )
        live = loader.load(version, model, beside)
        if spoil := self._spoil.get(version.name):
            spoil(live.engine)
        return live

    def _on_dead(self) -> None:
        self.dead += 1

    async def rank(self) -> str:
        """The version that answered, or the fault."""
        try:
            answer = await self.service.rank(MESSAGE, Context())
        except grpc.aio.AbortError as error:
            return str(error).partition(":")[0]
        return ranking_pb2.RankResponse.FromString(answer).version

    async def drained(self) -> None:
        for _ in range(1000):
            if not self.models.draining:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a version does not drain")


def run(
    root: Path, store: LmdbStore, test: Callable[[Desk], Awaitable[None]], **spoil: Callable[[Engine], None]
) -> None:
    async def started() -> None:
        desk = Desk(root, store, {name.removeprefix("v"): change for name, change in spoil.items()})
        await desk.reloader.start()
        await test(desk)
        assert await desk.models.stop()

    asyncio.run(asyncio.wait_for(started(), 60))


def nan(engine: Engine) -> None:
    right = engine.launch
    engine.launch = lambda *given: right(*given) * np.nan  # type: ignore[method-assign]


def raising(error: BaseException) -> Callable[[Engine], None]:
    def launch(*_: Any) -> NoReturn:
        raise error

    return lambda engine: setattr(engine, "launch", launch)


@pytest.mark.parametrize(
    ("spoil", "fault"), [(nan, Fault.BAD_SCORES), (raising(RuntimeError("device")), Fault.INTERNAL)]
)
def test_a_version_without_good_scores_is_left_by_itself(
    root: Path, store: LmdbStore, spoil: Callable[[Engine], None], fault: Fault
) -> None:
    async def test(desk: Desk) -> None:
        assert await desk.rank() == "1"
        await desk.reloader.load("2")
        assert [await desk.rank() for _ in range(7)] == [fault.name] * 5 + ["1", "1"]
        assert desk.models.standby is None
        await desk.drained()
        value = desk.metrics.registry.get_sample_value
        assert value("flame_rollbacks_total", {"reason": "failing"}) == 1
        assert value("flame_finished_total", {"outcome": "error", "code": fault.name, "version": "2"}) == 5
        assert value("flame_finished_total", {"outcome": "ok", "code": "OK", "version": "1"}) == 3
        assert value("flame_accepted_total") == 8

    run(root, store, test, v2=spoil)


class Death(BaseException):
    """Not an Exception: it ends the thread it is raised in."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_version_whose_dispatcher_dies_is_left_at_once(root: Path, store: LmdbStore) -> None:
    async def test(desk: Desk) -> None:
        await desk.reloader.load("2")
        assert await desk.rank() == "INTERNAL"
        await left(desk)
        assert desk.dead == 0
        await desk.drained()
        await desk.reloader.split("2", 1.0)
        assert await desk.rank() == "INTERNAL"
        await left(desk)
        assert desk.models.canary is None
        await desk.drained()

    async def left(desk: Desk) -> None:
        # A call may still come between the thread's death and the event loop's hearing of it.
        while (answer := await desk.rank()) == "OVERLOADED":
            await asyncio.sleep(0)
        assert answer == "1"

    run(root, store, test, v2=raising(Death()))


def test_the_last_version_ends_the_process_when_its_dispatcher_dies(root: Path, store: LmdbStore) -> None:
    async def test(desk: Desk) -> None:
        assert await desk.rank() == "INTERNAL"
        for _ in range(100):
            if desk.dead:
                break
            await asyncio.sleep(0.01)
        assert desk.dead == 1

    run(root, store, test, v1=raising(Death()))


def test_a_call_stays_with_its_version_until_it_ends(root: Path, store: LmdbStore) -> None:
    async def test(desk: Desk) -> None:
        calls = [asyncio.create_task(desk.rank()) for _ in range(40)]
        await asyncio.sleep(0)  # every call is routed, none is answered
        live = desk.models.active
        assert live.in_flight == 40
        await desk.reloader.load("2")
        desk.models.end_standby()
        calls += [asyncio.create_task(desk.rank()) for _ in range(10)]
        assert await asyncio.gather(*calls) == ["1"] * 40 + ["2"] * 10
        await desk.drained()
        assert live.in_flight == 0

    run(root, store, test)


def test_a_freed_version_leaves_nothing_on_the_device(root: Path, store: LmdbStore) -> None:
    async def test(desk: Desk) -> None:
        assert await desk.rank() == "1"
        gc.collect()
        before = on_device()
        await desk.reloader.load("2")
        assert await desk.rank() == "2"
        first = desk.models.standby
        assert first is not None
        engine, slot = weakref.ref(first.engine), weakref.ref(first.dispatcher)
        assert on_device() > before
        del first
        # Freed by its last reference: the garbage collector would come too late for the next version's memory.
        gc.disable()
        try:
            desk.models.end_standby()
            await desk.drained()
            for _ in range(100):
                if engine() is None and slot() is None:
                    break
                await asyncio.sleep(0.01)
            assert (engine(), slot()) == (None, None)
            assert on_device() == before
        finally:
            gc.enable()

    run(root, store, test)


def test_a_load_that_fails_leaves_nothing_on_the_device(
    root: Path, store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when device memory runs out while the new version warms up."""

    async def test(desk: Desk) -> None:
        gc.collect()
        before = on_device()
        gc.disable()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Engine, "warm", exhausted)
                with pytest.raises(Exception, match=r"BAD_VERSION: .*RESOURCE_EXHAUSTED: Out of memory") as caught:
                    await desk.reloader.load("2")
            assert "\n" not in str(caught.value)
            del caught
            assert on_device() == before
        finally:
            gc.enable()
        assert await desk.rank() == "1"
        await desk.reloader.load("2")
        assert await desk.rank() == "2", "a command tries again"

    def exhausted(_: Engine) -> NoReturn:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 byte\n" + "x" * 10_000)

    run(root, store, test)


def refusal(root: Path, store: LmdbStore, name: str, model: str = "climber", **changed: Any) -> str:
    loop = asyncio.new_event_loop()
    try:
        loader = Loader(
            store=store,
            loop=loop,
            on_fatal=lambda _: None,
            trusted=None,
            **{"config": CONFIG, "devices": [tiny.device()], **changed},
        )
        with pytest.raises(LoadError) as caught:
            loader.load(Version(name, root / "climber" / name, ""), model, False)
    finally:
        loop.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(root: Path, store: LmdbStore, tmp_path: Path) -> None:
    copy = tmp_path / "climber" / "5"
    shutil.copytree(root / "climber" / "1", copy)
    assert "is version '1', not '5'" in refusal(tmp_path, store, "5")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"version": "5"}))
    assert "is of model 'climber', not 'other'" in refusal(tmp_path, store, "5", model="other")
    manifest["schema"]["actions"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest | {"version": "5"}))
    assert "was written for another feature schema" in refusal(tmp_path, store, "5")
    assert "no artifact at" in refusal(tmp_path, store, "6")


def test_an_error_nobody_foresaw_is_refused_in_one_line(
    root: Path, store: LmdbStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Engine) -> NoReturn:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Engine, "warm", broken)
    assert refusal(root, store, "1").endswith("can't be loaded: ZeroDivisionError")
    assert "Traceback" in caplog.text


def test_slots_that_cannot_be_had_name_the_setting(
    root: Path, store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.memfd_create", full)
    assert "Too many open files; see dispatch.executors" in refusal(root, store, "1")
