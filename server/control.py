"""`flame.v1.ModelControl`: what operators may do to a running server, on the admin port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from flame_jax.fke.repository import RepositoryError
from flame_jax.server.errors import CommandRefused, Refusal
from flame_jax.server.models import Models
from flame_jax.server.proto import control_pb2
from flame_jax.server.reload import Reloader
from flame_jax.server.state import State, describe

CONTROL = "flame.v1.ModelControl"

log = logging.getLogger(__name__)


class ModelControl:
    """Answers commands with the state after the change, or with one status, a fixed code and the reason."""

    def __init__(self, models: Models, reloader: Reloader) -> None:
        self._models, self._reloader = models, reloader
        self._commands: set[asyncio.Task[State]] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service with raw-bytes methods, as the ranking service has them."""
        reloader = self._reloader

        async def nothing(_: Any) -> None: ...

        commands: dict[str, tuple[type[Message], Callable[[Any], Awaitable[None]]]] = {
            "List": (control_pb2.ListRequest, nothing),
            "Load": (control_pb2.LoadRequest, lambda wire: reloader.load(wire.version)),
            "Rollback": (control_pb2.RollbackRequest, lambda _: reloader.rollback()),
            "Split": (control_pb2.SplitRequest, lambda wire: reloader.split(wire.version, wire.share)),
        }
        return grpc.method_handlers_generic_handler(
            CONTROL, {name: grpc.unary_unary_rpc_method_handler(self._method(*of)) for name, of in commands.items()}
        )

    def _method(
        self, kind: type[Message], command: Callable[[Any], Awaitable[None]]
    ) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
        async def answer(message: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                # Its own task: a command is carried out to its end even when its caller goes away.
                task = asyncio.create_task(self._carry_out(kind, command, message))
                self._commands.add(task)
                task.add_done_callback(self._commands.discard)
                return _encode(await asyncio.shield(task))
            except CommandRefused as error:
                refused = error
            except Exception:
                log.exception("a command failed")
                refused = CommandRefused(Refusal.INTERNAL, "the command failed; the server's log tells why")
            await context.abort(refused.code.status, str(refused))
            raise AssertionError("abort raises")

        return answer

    async def _carry_out(self, kind: type[Message], command: Callable[[Any], Awaitable[None]], message: bytes) -> State:
        try:
            wire = kind.FromString(message)
        except DecodeError:
            name = kind.DESCRIPTOR.full_name
            raise CommandRefused(Refusal.MALFORMED_MESSAGE, f"the message is not a {name}") from None
        try:
            await command(wire)
        except RepositoryError as error:
            raise CommandRefused(Refusal.UNREADABLE, str(error)) from None
        return await describe(self._models, self._reloader)


def _encode(state: State) -> bytes:
    answer = control_pb2.ModelState(model=state.model, pinned=state.pinned)
    for row in state.versions:
        status = control_pb2.VersionState.Status.Value(row.status.upper())
        answer.versions.add(**{**row._asdict(), "status": status})
    return answer.SerializeToString()
