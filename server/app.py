"""Start, serve, drain."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
import jax
import uvloop

from flame_jax.commandline import load, refuse
from flame_jax.config import Config, ServerConfig
from flame_jax.dso.scheduler import Scheduler
from flame_jax.fke.compile import CompileCounter
from flame_jax.fke.repository import Repository, RepositoryError, SingleArtifact, Source
from flame_jax.fke.signing import KeyFileError, TrustedKeys
from flame_jax.interpreter import settle
from flame_jax.pda import affinity
from flame_jax.pda.hot_rows import SAMPLE
from flame_jax.pda.open import open_store
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.store import Store, StoreError
from flame_jax.pda.store_url import redacted
from flame_jax.schema import FeatureSchema
from flame_jax.server.background import any_running, in_background
from flame_jax.server.control import CONTROL, ModelControl
from flame_jax.server.listen import StartError, address, bind, open_port
from flame_jax.server.live import LiveModel, Loader, LoadError
from flame_jax.server.metrics import Metrics, Row
from flame_jax.server.models import STEPS, Models
from flame_jax.server.ranking import SERVICE, RankingService
from flame_jax.server.reload import Reloader

PROG = "python -m flame_jax.server"
REFUSING, QUIET = 1.0, 0.1
"""Seconds for which a server that has drained refuses calls at most; and without any after which it stops."""

log = logging.getLogger("flame_jax.server")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM; the process's exit status says how it ended."""
    config = load(argv, prog=PROG)
    logging.basicConfig(
        level=config.server.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        _bind_cores(config.server)
        status = uvloop.run(serve(config))
    except (StartError, LoadError, StoreError, RepositoryError, KeyFileError) as error:
        refuse(PROG, str(error), status=1)
    if any_running():
        # A load can't be interrupted, and an interpreter that goes away under one crashes.
        logging.shutdown()
        os._exit(status)
    raise SystemExit(status)


def _bind_cores(settings: ServerConfig) -> None:
    """Before any thread is started that should stay there, too."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    uses_gpu = not platforms or "cuda" in platforms
    try:
        binding = affinity.choose(str(settings.cores), affinity.first_gpu() if uses_gpu else None)
    except ValueError as error:
        raise StartError(str(error)) from error
    affinity.bind(binding)
    log.info("%s", binding.reason)


async def serve(config: Config) -> int:
    """Load everything, answer calls until told to stop, drain.

    Raises:
        StartError, LoadError, StoreError, RepositoryError, KeyFileError: something needed at start is missing or
            doesn't fit.
    """
    settings = config.server
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stopped)
    server, port = _bind_ranking(settings)
    admin, admin_port = _bind_admin(settings)
    store, metrics, models = await open_store(config.store), Metrics(), Models()
    query = FeatureQuery(store, config.cache)
    metrics_port = _listen(metrics, settings)
    reloader = await _unless(stopped, _load(config, store, models, metrics, stopped))
    if reloader is None:
        log.info("stopped while loading")
        return await stopped

    manifest = models.active.manifest
    if config.schema not in (FeatureSchema(), manifest.schema):
        log.warning("the configuration's schema is not the artifact's, which is the one served")
    shown = dataclasses.replace(config, store=dataclasses.replace(config.store, url=redacted(config.store.url)))
    log.info("configuration: %s", json.dumps(dataclasses.asdict(shown)))
    service = RankingService(
        model=reloader.model, models=models, config=settings, query=query, metrics=metrics, on_failed=reloader.failed
    )
    compiles = CompileCounter()
    _export(metrics, models, service, compiles)
    _export_cache(metrics, query)
    checks = await open_port(server, SERVICE, service.handler())
    if admin is not None:
        await open_port(admin, CONTROL, ModelControl(models, reloader).handler())
    watching = asyncio.create_task(reloader.watch()) if settings.models_dir and settings.poll_seconds else None
    settle()
    print(
        f"READY grpc={address(settings.host, port)} metrics={address(settings.host, metrics_port)} "
        f"admin={'off' if admin is None else address(settings.admin_host, admin_port)} "
        f"model={reloader.model} version={manifest.version} buckets={len(manifest.buckets)}",
        flush=True,
    )

    status = await stopped
    log.info("draining %d calls", service.in_flight)
    service.draining = True
    reloader.close()
    if watching is not None:
        watching.cancel()
    await checks.enter_graceful_shutdown()
    if not await _drained(service, settings.drain_seconds):
        log.error("%d calls did not finish within server.drain_seconds", service.in_flight)
        status = 1
    await _until_nobody_calls(service)
    await asyncio.gather(*(each.stop(grace=1.0) for each in (server, admin) if each is not None))
    if status == 0 and not await models.stop():
        log.error("a batch did not finish: the device hangs")
        status = 1
    await query.aclose()
    log.info("stopped; %d compilations after READY", compiles.count)
    return status


async def _load(
    config: Config, store: Store, models: Models, metrics: Metrics, stopped: asyncio.Future[int]
) -> Reloader:
    """Load what is served first."""
    settings = config.server
    source: Source = (
        Repository(settings.models_dir, settings.model)
        if settings.models_dir
        else SingleArtifact(config.export.artifact)
    )
    trusted = TrustedKeys(settings.trusted_keys) if settings.trusted_keys else None
    if trusted is None:
        log.warning(
            "server.trusted_keys is empty: artifacts are native code, and whoever can write to %s can run it here",
            settings.models_dir or config.export.artifact,
        )
    devices = await in_background(partial(_devices, config.dispatch.devices))
    loop = asyncio.get_running_loop()

    def died(live: LiveModel) -> None:
        reloader.died(live)

    loader = Loader(config, store, trusted, devices, loop, on_fatal=died)
    reloader = Reloader(source, loader.load, models, metrics, settings, on_dead=partial(_stop, stopped, 1))
    await reloader.start()
    return reloader


def _devices(count: int) -> list[jax.Device]:
    try:
        found = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        raise StartError("JAX finds no device; see JAX_PLATFORMS and the installed extra (cuda13, cuda12)") from error
    if len(found) < count:
        raise StartError(f"dispatch.devices is {count}, but JAX finds {len(found)} on this machine")
    return list(found[:count])


async def _unless[T](stopped: asyncio.Future[int], work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns, or None when the process is told to stop meanwhile."""
    task = asyncio.create_task(work)
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    return None


def _bind_ranking(settings: ServerConfig) -> tuple[grpc.aio.Server, int]:
    size = settings.max_message_mib << 20
    options = [
        # Per connection: enough to refuse calls at once, few enough to bound what waits in our memory.
        ("grpc.max_concurrent_streams", settings.max_in_flight + 256),
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
    ]
    return bind("gRPC", settings.host, settings.port, options)


def _bind_admin(settings: ServerConfig) -> tuple[grpc.aio.Server | None, int]:
    if settings.admin_port < 0:
        return None, settings.admin_port
    return bind("admin", settings.admin_host, settings.admin_port)


def _listen(metrics: Metrics, settings: ServerConfig) -> int:
    try:
        return metrics.listen(settings.host, settings.metrics_port)
    except OSError as error:
        where = address(settings.host, settings.metrics_port)
        raise StartError(f"metrics port {where} can't be bound: {error.strerror}") from error


def _export(metrics: Metrics, models: Models, service: RankingService, compiles: CompileCounter) -> None:
    """What is read when it is scraped, from another thread."""
    metrics.counters(
        "flame_compiles_after_ready", "XLA compilations since the server was ready", [], lambda: [((), compiles.count)]
    )
    metrics.counters(
        "flame_item_rows",
        "Rows of item tables in host memory that calls used, about, by the memory that held them",
        ["version", "memory"],
        lambda: _item_rows(models),
    )
    metrics.gauge("flame_in_flight", "Calls being answered", lambda: service.in_flight)
    _export_dispatchers(metrics, models)
    metrics.gauge("flame_split_share", "Share of users that the canary serves", lambda: models.share / STEPS)
    metrics.gauges(
        "flame_model_role",
        "What each live version does",
        ["version", "role"],
        lambda: sorted({((live.version, str(role)), 1.0) for live, role in models}),
    )
    metrics.gauges(
        "flame_recompiled_buckets",
        "Executables that this CPU could not run and that were compiled anew before READY",
        ["version"],
        lambda: sorted({((live.version,), float(len(live.engine.recompiled))) for live, _ in models}),
    )
    metrics.gauges(
        "flame_golden_difference",
        "How far the golden requests' probabilities lay from the artifact's when it was loaded",
        ["version"],
        lambda: sorted({((live.version,), live.golden_difference) for live, _ in models}),
    )


def _export_dispatchers(metrics: Metrics, models: Models) -> None:
    def total(read: Callable[[Scheduler], int]) -> Callable[[], float]:
        return lambda: sum(read(live.dispatcher.scheduler) for live, _ in models)

    def by_version(read: Callable[[Scheduler], Mapping[str, float]]) -> Callable[[], list[Row]]:
        def rows() -> list[Row]:
            totals: Counter[tuple[str, str]] = Counter()
            for live, _ in models:
                for label, value in read(live.dispatcher.scheduler).items():
                    totals[live.version, label] += value  # type: ignore[assignment]
            return list(totals.items())

        return rows

    metrics.gauge("flame_queued", "Requests waiting for a dispatcher", total(lambda books: len(books.queue)))
    metrics.gauge("flame_queue_limit", "Requests that may wait, over all versions", total(lambda b: b.limit.limit))
    metrics.gauges(
        "flame_lanes",
        "Lanes of each live version, by whether they are in use or broken",
        ["version", "state"],
        by_version(lambda books: Counter("in use" if lane.alive else "broken" for lane in books.lanes)),
    )
    metrics.gauges(
        "flame_batch_seconds",
        "What a batch of each bucket is expected to take while one lane is busy",
        ["version", "bucket"],
        lambda: sorted(
            ((live.version, str(bucket)), seconds[0])
            for live, _ in {live.version: (live, role) for live, role in models}.values()
            for bucket, seconds in live.dispatcher.scheduler.costs.table().items()
        ),
    )
    metrics.counters(
        "flame_dispatched",
        "Requests of live versions that expired or were refused in the queue, or ran once more after a batch failed",
        ["version", "what"],
        by_version(lambda b: {"expired": b.expired, "refused": b.refused, "retried": b.retried}),
    )


def _item_rows(models: Models) -> list[Row]:
    """Uses of rows that the device held and of rows that came with the slot; a version may be live twice."""
    totals: Counter[tuple[str, str]] = Counter()
    for live, _ in models:
        if live.hot is not None:
            for memory, count in zip(("device", "host"), live.hot.counted, strict=True):
                totals[live.version, memory] += SAMPLE * count
    return list(totals.items())


def _export_cache(metrics: Metrics, query: FeatureQuery) -> None:
    cache = query.cache
    if cache is None:
        return
    metrics.counters(
        "flame_cache_lookups",
        "Items looked up in the cache: hits, entries that were too old, and what was not there",
        ["result"],
        lambda: zip((("hit",), ("stale",), ("miss",)), cache.counts[:3], strict=True),
    )
    metrics.counters(
        "flame_cache_evictions", "Entries that made room for others", [], lambda: [((), cache.counts.evictions)]
    )
    metrics.counters("flame_cache_refreshes", "Items fetched in the background", [], lambda: [((), query.refreshed)])
    metrics.gauge("flame_cache_bytes", "Memory that the cache takes, about", lambda: cache.nbytes)


def _on_signal(stopped: asyncio.Future[int]) -> None:
    """The first signal drains; a second one ends the process at once."""
    if stopped.done():
        log.warning("second signal: stopping without drain")
        os._exit(1)
    _stop(stopped, 0)


def _stop(stopped: asyncio.Future[int], status: int) -> None:
    if not stopped.done():
        stopped.set_result(status)


async def _drained(service: RankingService, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            while service.in_flight:
                await asyncio.sleep(0.01)
    except TimeoutError:
        return False
    return True


async def _until_nobody_calls(service: RankingService) -> None:
    """Go on refusing calls until none comes: one that gRPC has not handed over when its server stops is not told
    UNAVAILABLE, but CANCELLED."""
    until = time.monotonic() + REFUSING
    while time.monotonic() < until:
        before = service.calls
        await asyncio.sleep(QUIET)
        if service.calls == before and not service.in_flight:
            return
