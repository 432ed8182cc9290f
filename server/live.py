"""One loaded version and everything that serves it."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import jax

from flame_jax.config import Config
from flame_jax.dso.calibrate import start_lanes
from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.executor import Executor
from flame_jax.dso.lanes import Lane, hand_over_hot_rows
from flame_jax.dso.start import make_scheduler
from flame_jax.dso.work import Done
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.engine import Engine
from flame_jax.fke.repository import Version
from flame_jax.fke.signing import TrustedKeys
from flame_jax.host_table import host_table
from flame_jax.packing import Bucket
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.hot_rows import HotRows, Renewal
from flame_jax.pda.page_lock import PageLock
from flame_jax.pda.store import Store, StoreError
from flame_jax.server.validation import Validator
from flame_jax.workspace import BufferPool

log = logging.getLogger(__name__)

_REASON = 500
"""Characters of a reason at most: XLA tells whole pages."""


class LoadError(Exception):
    """A version can't be served; the message is one clear line."""


class Inbox:
    """Brings finished requests from the completion thread to the event loop, one wake-up per batch."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._futures: dict[int, asyncio.Future[Done]] = {}
        self._tickets = count()

    def open(self) -> tuple[int, asyncio.Future[Done]]:
        """A ticket and the future of its result."""
        ticket, future = next(self._tickets), self._loop.create_future()
        self._futures[ticket] = future
        return ticket, future

    def close(self, ticket: int) -> None:
        """Forget a ticket; a late result is dropped."""
        self._futures.pop(ticket, None)

    def deliver(self, done: list[Done]) -> None:
        """Called from any thread."""
        self._loop.call_soon_threadsafe(self._resolve, done)

    def _resolve(self, done: list[Done]) -> None:
        for result in done:
            future = self._futures.pop(result.ticket, None)
            if future is not None and not future.done():
                future.set_result(result)


class LiveModel:
    """A version that answers calls. Its counts belong to the event loop.

    Args:
        lanes: one at least.
        measured: what batches take on them, see `CostModel`.
        identity: see `repository.Version`.
        on_fatal: called on the event loop when a thread of the dispatcher died: this version answers no more.

    Attributes:
        lanes: how many there are.
        engine: the first lane's.
        golden_difference: the largest of all lanes, see `Engine`.
        in_flight: calls routed to it that have not ended.
        ok: calls answered since it got its role.
        records: whose memory requests' records are made in.
        failed: calls that ended by its own fault since then.
        hot: rows of an item table in host memory that the device holds, if any.

    Raises:
        OSError: slots can't be allocated.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        measured: Mapping[Bucket, Sequence[float]],
        identity: str,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        on_fatal: Callable[[LiveModel], None],
    ) -> None:
        engine = lanes[0].engine
        manifest = engine.manifest
        self.engine, self.manifest, self.identity, self.lanes = engine, manifest, identity, len(lanes)
        self.golden_difference = max(lane.engine.golden_difference for lane in lanes)
        self.version, self.schema = manifest.version, manifest.schema
        self.in_flight = self.ok = self.failed = 0
        self.validator = Validator(manifest.schema, config.server)
        self._table = host_table(engine.item_table, config.dispatch.row_threads)
        self.records = BufferPool()
        self.assembler = Assembler(manifest.schema, engine.vocabularies, self._table, self.records)
        self.page_locks = {device: PageLock(device) for device in dict.fromkeys(lane.device for lane in lanes)}
        first = hand_over_hot_rows(lanes)
        self.hot = HotRows(engine.item_table, first) if engine.item_table is not None and first else None
        self.inbox = Inbox(loop)
        # Weakly: a freed version must not wait for the garbage collector to give its device memory back.
        this = weakref.ref(self)

        def died() -> None:
            if (live := this()) is not None:
                loop.call_soon_threadsafe(on_fatal, live)

        locks, hot, records = self.page_locks, self.hot, self.assembler.layout

        def executors(engine: Engine) -> list[Executor]:
            lock, every = locks[engine.device], [*manifest.buckets] * config.dispatch.executors
            return [Executor(engine, bucket, records, manifest.layout, lock, hot) for bucket in every]

        engines = [lane.engine for lane in lanes]

        def again(number: int) -> list[Executor]:
            engines[number] = engines[number].reloaded(None if hot is None else hot.held)
            return executors(engines[number])

        scheduler = make_scheduler(
            config.dispatch,
            manifest.layout,
            measured,
            shares=list(config.server.traffic_classes.values()),
            lanes=len(lanes),
            on_left=self.records.give,
        )
        self.dispatcher = Dispatcher(
            [executors(engine) for engine in engines],
            scheduler,
            records,
            on_done=self.inbox.deliver,
            on_fatal=died,
            rebuild=again,
            hang_seconds=config.dispatch.hang_seconds,
        )
        # Last: nothing would end its thread if anything before failed.
        self._renewal = Renewal(self.hot, config.dispatch.hot_rows_seconds) if self.hot is not None else None

    @property
    def memory(self) -> dict[str, str]:
        """What slots are read from, and where scores are left."""
        slots = sorted({lock.memory for lock in self.page_locks.values()})
        return {"slots": ", ".join(slots), "scores": self.engine.scores_memory}

    def stop(self, seconds: float) -> bool:
        """End its threads; blocks. False when a batch still runs after this long: the device hangs."""
        stopped = self.dispatcher.stop(seconds)
        if stopped and self._table is not None:
            self._table.close()
        if self._renewal is not None:
            self._renewal.close(seconds)
        return stopped


@dataclass(frozen=True)
class Loader:
    """Loads versions of one server.

    Attributes:
        trusted: see `Artifact`.
        devices: of JAX's own client; every version has lanes on all of them.
        on_fatal: see `LiveModel`.
    """

    config: Config
    store: Store
    trusted: TrustedKeys | None
    devices: Sequence[jax.Device]
    loop: asyncio.AbstractEventLoop
    on_fatal: Callable[[LiveModel], None]

    def load(self, version: Version, model: str, beside: bool) -> LiveModel:
        """Load and warm a version; takes seconds, runs on any thread.

        Args:
            model: name that its manifest must have; any when empty.
            beside: see `Engine`.

        Raises:
            LoadError: it is damaged, was built for something else, or doesn't fit the device.
        """
        try:
            return self._load(version, model, beside)
        except (ArtifactError, StoreError) as error:
            reason = str(error)
        except jax.errors.JaxRuntimeError as error:
            reason = f"the device can't run artifact {version.path}: {error}"
        except OSError as error:
            reason = f"slots can't be allocated: {error.strerror}; see dispatch.executors and ulimit -n"
        except Exception as error:
            log.exception("version %s can't be loaded", version.name)
            reason = f"artifact {version.path} can't be loaded: {type(error).__name__}"
        # Raised here, where nothing holds the failed load's frames, and with them device memory, any longer.
        raise LoadError(" ".join(reason.split())[:_REASON])

    def _load(self, version: Version, model: str, beside: bool) -> LiveModel:
        artifact = Artifact(version.path, self.trusted)
        manifest = artifact.manifest
        if model and manifest.model.name != model:
            raise ArtifactError(f"artifact {artifact.path} is of model {manifest.model.name!r}, not {model!r}")
        if manifest.version != version.name:
            raise ArtifactError(f"artifact {artifact.path} is version {manifest.version!r}, not {version.name!r}")
        self.store.description.check(manifest.schema, self.store.name)
        engine = Engine(artifact, self.devices[0], beside=beside)
        lanes, measured = start_lanes(engine, self.config.dispatch, self.devices)
        return LiveModel(lanes, measured, version.identity, self.config, self.loop, self.on_fatal)
