"""What is outside of the process that is measured: callers, and a store that is a round trip away."""

from __future__ import annotations

import asyncio
import multiprocessing
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.pda.servers import Proxy

MOMENT = struct.Struct("<d")
_spawn = multiprocessing.get_context("spawn")


@contextmanager
def _process(work: Callable[..., None], *given: Any) -> Iterator[Connection]:
    """A process that ends when the connection to it is closed."""
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=work, args=(theirs, *given), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()


@contextmanager
def far(port: int, seconds: float) -> Iterator[int]:
    """A port behind which the server at `port` answers that much later."""
    with _process(_far, port, seconds) as connection:
        yield int(connection.recv())


def _far(connection: Connection, port: int, seconds: float) -> None:
    async def serve() -> None:
        proxy = Proxy(port)
        proxy.delay = seconds
        connection.send(await proxy.start())
        await asyncio.to_thread(_until_closed, connection)
        await proxy.stop()

    # epoll counts in milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve())


def _until_closed(connection: Connection) -> None:
    with suppress(EOFError):
        connection.recv()


class Callers:
    """Calls at random moments, so many a second on average, whether or not earlier ones are answered."""

    def __init__(self, connection: Connection, end: socket.socket) -> None:
        self._connection, self.end = connection, end

    def call(self, rate: float, seconds: float) -> int:
        """Begin; returns the number of calls. Each is a `MOMENT` sent to `end`: when it was due (time.monotonic)."""
        self._connection.send((rate, seconds))
        return int(self._connection.recv())


@contextmanager
def callers() -> Iterator[Callers]:
    """A process that calls."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, _process(_call, theirs) as connection:
        yield Callers(connection, ours)


def _call(connection: Connection, end: socket.socket) -> None:
    random = np.random.default_rng(0)
    while True:
        try:
            rate, seconds = connection.recv()
        except EOFError:
            return
        moments = np.cumsum(random.exponential(1.0 / rate, max(1, int(rate * seconds)))) + 0.05
        connection.send(len(moments))
        begun = time.monotonic()
        for moment in (moments + begun).tolist():
            if (wait := moment - time.monotonic()) > 0:
                time.sleep(wait)
            end.sendall(MOMENT.pack(moment))
