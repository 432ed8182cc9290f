"""gRPC ports: taken before anything slow is loaded, opened once there is something to answer with."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

# The generated modules register the message types that reflection describes.
from flame_jax.server.proto import control_pb2, ranking_pb2  # noqa: F401

Options = Sequence[tuple[str, int]]


class StartError(Exception):
    """The server can't start; the message is one clear line."""


def address(host: str, port: int) -> str:
    """HOST:PORT, as gRPC and people read it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(what: str, host: str, port: int, options: Options = ()) -> tuple[grpc.aio.Server, int]:
    """A server that doesn't answer yet, and its port. Raises StartError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = address(host, port)
    try:
        # gRPC prints a line of its own when it can't bind, so ask the kernel first.
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise StartError(f"{what} port {where} can't be bound: {error.strerror}") from error
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *options])
    try:
        return server, server.add_insecure_port(where)
    except RuntimeError as error:
        raise StartError(f"{what} port {where} can't be bound") from error


async def open_port(
    server: grpc.aio.Server, service: str, handler: grpc.GenericRpcHandler
) -> health.aio.HealthServicer:
    """Answer calls of one service, probes and reflection."""
    checks = health.aio.HealthServicer()
    server.add_generic_rpc_handlers((handler,))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    for name in ("", service):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return checks
