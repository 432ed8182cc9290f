"""Start, serve, drain."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial

import grpc
import jax
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flame_jax.commandline import load, refuse
from flame_jax.config import Config, ServerConfig
from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.executor import Executor
from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.compile import CompileCounter
from flame_jax.fke.engine import Engine
from flame_jax.pda.assembler import Assembler
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.store import StoreError
from flame_jax.schema import FeatureSchema
from flame_jax.server.metrics import Metrics
from flame_jax.server.ranking import SERVICE, Inbox, RankingService

# The generated module registers the message types that reflection describes.
from flame_jax.server.proto import ranking_pb2  # noqa: F401  isort: skip

PROG = "python -m flame_jax.server"
STOP_SECONDS = 5.0
"""After the drain, how long the dispatcher may take to finish what runs on the device."""

log = logging.getLogger("flame_jax.server")


class StartError(Exception):
    """The server can't start; the message is one clear line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM; the process's exit status says how it ended."""
    config = load(argv, prog=PROG)
    logging.basicConfig(
        level=config.server.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        status = uvloop.run(serve(config))
    except (StartError, ArtifactError, StoreError) as error:
        refuse(PROG, str(error), status=1)
    raise SystemExit(status)


async def serve(config: Config) -> int:
    """Load everything, answer calls until told to stop, drain.

    Raises:
        StartError, ArtifactError, StoreError: something needed at start is missing or doesn't fit.
    """
    settings = config.server
    metrics = Metrics()
    server, port = _bind(config)
    artifact = Artifact(config.export.artifact)
    manifest = artifact.manifest
    if config.schema not in (FeatureSchema(), manifest.schema):
        log.warning("the configuration's schema is not the artifact's, which is the one served")
    store = LmdbStore(config.store.path, manifest.schema)
    metrics_port = _listen(metrics, settings)

    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    engine = _load(artifact)
    service, dispatcher = _assemble(config, engine, store, metrics, stopped)
    log.info("configuration: %s", json.dumps(dataclasses.asdict(config)))
    compiles = CompileCounter()
    _export(metrics, engine, service, dispatcher, compiles)
    checks = await _start(server, service, stopped)
    print(
        f"READY grpc={_address(settings.host, port)} metrics={_address(settings.host, metrics_port)} "
        f"model={manifest.model.name} version={manifest.version} buckets={len(manifest.buckets)}",
        flush=True,
    )

    status = await stopped
    log.info("draining %d calls", service.in_flight)
    service.draining = True
    await checks.enter_graceful_shutdown()
    if not await _drained(service, settings.drain_seconds):
        log.error("%d calls did not finish within server.drain_seconds", service.in_flight)
        status = 1
    await server.stop(grace=1.0)
    if status == 0 and not await asyncio.to_thread(dispatcher.stop, STOP_SECONDS):
        log.error("a batch did not finish: the device hangs")
        status = 1
    store.close()
    log.info("stopped; %d compilations after READY", compiles.count)
    return status


def _listen(metrics: Metrics, settings: ServerConfig) -> int:
    try:
        return metrics.listen(settings.host, settings.metrics_port)
    except OSError as error:
        address = _address(settings.host, settings.metrics_port)
        raise StartError(f"metrics port {address} can't be bound: {error.strerror}") from error


def _load(artifact: Artifact) -> Engine:
    """The artifact's model on the first device, warm."""
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        raise StartError("JAX finds no device; see JAX_PLATFORMS and the installed extra (cuda13, cuda12)") from error
    try:
        engine = Engine(artifact, device)
        engine.warm()
    except jax.errors.JaxRuntimeError as error:
        raise StartError(f"the device can't run artifact {artifact.path}: {error}") from error
    return engine


def _assemble(
    config: Config, engine: Engine, store: LmdbStore, metrics: Metrics, stopped: asyncio.Future[int]
) -> tuple[RankingService, Dispatcher]:
    """Slots, dispatcher and service of one loaded model."""
    manifest, loop = engine.manifest, asyncio.get_running_loop()
    assembler = Assembler(manifest.schema, engine.vocabularies, engine.item_table)
    inbox = Inbox(loop)

    def die() -> None:
        loop.call_soon_threadsafe(_stop, stopped, 1)

    try:
        executors = [
            Executor(engine, bucket, assembler.layout, manifest.layout)
            for bucket in manifest.buckets
            for _ in range(config.dispatch.executors)
        ]
    except OSError as error:
        raise StartError(f"slots can't be allocated: {error.strerror}; see dispatch.executors and ulimit -n") from error
    dispatcher = Dispatcher(
        executors,
        manifest.buckets,
        manifest.layout,
        assembler.layout,
        tasks=len(manifest.schema.tasks),
        max_queue=config.dispatch.max_queue,
        on_done=inbox.deliver,
        on_fatal=die,
    )
    service = RankingService(
        schema=manifest.schema,
        model=manifest.model.name,
        version=manifest.version,
        config=config.server,
        store=store,
        assembler=assembler,
        dispatcher=dispatcher,
        inbox=inbox,
        metrics=metrics,
    )
    return service, dispatcher


async def _start(
    server: grpc.aio.Server, service: RankingService, stopped: asyncio.Future[int]
) -> health.aio.HealthServicer:
    """Answer calls, probes and reflection, and listen to signals."""
    checks = health.aio.HealthServicer()
    server.add_generic_rpc_handlers((service.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stopped)
    return checks


def _bind(config: Config) -> tuple[grpc.aio.Server, int]:
    """Take the port before anything slow is loaded."""
    settings = config.server
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    address = _address(settings.host, settings.port)
    try:
        # gRPC prints a line of its own when it can't bind, so ask the kernel first.
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        raise StartError(f"gRPC port {address} can't be bound: {error.strerror}") from error
    size = settings.max_message_mib << 20
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            # Per connection: enough to refuse calls at once, few enough to bound what waits in our memory.
            ("grpc.max_concurrent_streams", settings.max_in_flight + 256),
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
        ]
    )
    try:
        return server, server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(f"gRPC port {address} can't be bound") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _export(
    metrics: Metrics, engine: Engine, service: RankingService, dispatcher: Dispatcher, compiles: CompileCounter
) -> None:
    manifest = engine.manifest
    metrics.model(
        {
            "name": manifest.model.name,
            "version": manifest.version,
            "platform": manifest.target.platform,
            "device_kind": manifest.target.device_kind,
            **{f"kernel_{op}": implementation for op, implementation in manifest.kernels.items()},
        }
    )
    metrics.counter("flame_compiles_after_ready", "XLA compilations since the server was ready", lambda: compiles.count)
    metrics.gauge("flame_in_flight", "Calls being answered", lambda: service.in_flight)
    metrics.gauge("flame_queued", "Requests waiting for the dispatcher", lambda: dispatcher.queued)
    for bucket in dispatcher.launched:
        read = partial(dispatcher.launched.__getitem__, bucket)
        metrics.counter("flame_batches", "Batches launched", read, bucket=bucket)


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
