"""Change what a server serves: `ModelControlClient` for programs, `python -m flame_jax.client models` for people."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc

from flame_jax.server.proto import control_pb2, control_pb2_grpc

DEFAULT_ADMIN = "127.0.0.1:50052"


_Call = Callable[["ModelControlClient", argparse.Namespace], dict[str, Any]]


class ModelControlClient:
    """A connection to one server's admin port.

    Every command returns the state after it: `model`, `pinned` and `versions`, newest first, each with `version`,
    `status`, `share`, `in_flight`, `ok`, `failed` and `reason`; `server/proto/control.proto` tells what they mean.
    It raises grpc.RpcError when it was not carried out; the details begin with a fixed code.

    Args:
        target: HOST:PORT.
        timeout: seconds that a command may take; loading a model takes its time, and goes on without its caller.
    """

    def __init__(self, target: str = DEFAULT_ADMIN, *, timeout: float = 600.0) -> None:
        self._channel, self._timeout = grpc.insecure_channel(target), timeout
        self._stub: Any = control_pb2_grpc.ModelControlStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.close()

    def list(self) -> dict[str, Any]:
        """What is served and what is on disk."""
        return _state(self._stub.List(control_pb2.ListRequest(), timeout=self._timeout))

    def load(self, version: str = "") -> dict[str, Any]:
        """Serve a version to every user and pin it; without one, the newest good version, now and later."""
        return _state(self._stub.Load(control_pb2.LoadRequest(version=version), timeout=self._timeout))

    def rollback(self) -> dict[str, Any]:
        """Go back to the version before."""
        return _state(self._stub.Rollback(control_pb2.RollbackRequest(), timeout=self._timeout))

    def split(self, version: str, share: float) -> dict[str, Any]:
        """Serve a second version to `share` of the users, in (0, 1]; 0 ends the split."""
        request = control_pb2.SplitRequest(version=version, share=share)
        return _state(self._stub.Split(request, timeout=self._timeout))


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add `list`, `load`, `rollback` and `split`; each sets `run` (arguments to state) and `as_text`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, about: str, call: _Call) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.add_argument(
            "--admin", default=DEFAULT_ADMIN, metavar="HOST:PORT", help="server.admin_port (default %(default)s)"
        )
        added.add_argument("--json", action="store_true", help="one JSON object on stdout")
        added.set_defaults(run=partial(_run, call), as_text=_as_text)
        return added

    command("list", "what is served and what is on disk", lambda client, _: client.list())
    load = command("load", "serve a version to every user", lambda client, args: client.load(args.version))
    load.add_argument("version", nargs="?", default="", help="pins it; default: the newest good one, now and later")
    command("rollback", "go back to the version before", lambda client, _: client.rollback())
    split = command(
        "split", "serve a second version to some users", lambda client, args: client.split(args.version, args.share)
    )
    split.add_argument("version")
    split.add_argument("share", type=float, help="of the users, in (0, 1]; 0 ends the split")


def _run(call: _Call, args: argparse.Namespace) -> dict[str, Any]:
    with ModelControlClient(args.admin) as client:
        return call(client, args)


def _as_text(state: Mapping[str, Any]) -> str:
    served = f"pinned to {state['pinned']}" if state["pinned"] else "newest good version"
    lines = [f"model {state['model']}, {served}"]
    for row in state["versions"]:
        share = f"{row['share']:8.2%}" if row["share"] else " " * 8
        calls = f"{row['ok']} ok, {row['failed']} failed" if row["ok"] or row["failed"] else row["reason"]
        lines.append(f"{row['version']:>12}  {row['status']:<9} {share}  {calls}".rstrip())
    return "\n".join(lines)


def _state(message: control_pb2.ModelState) -> dict[str, Any]:
    state = {"model": message.model, "pinned": message.pinned}
    names = control_pb2.VersionState.Status.Name
    return state | {
        "versions": [
            {field.name: getattr(row, field.name) for field in row.DESCRIPTOR.fields}
            | {"status": names(row.status).lower()}
            for row in message.versions
        ]
    }
