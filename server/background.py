"""Slow work beside the event loop, on threads that do not keep the process alive."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial

from flame_jax.dso.dispatcher import REBUILD

_NAME = "flame-background"


async def in_background[T](work: Callable[[], T]) -> T:
    """What `work` returns or raises, from a daemon thread: unlike asyncio's own, it is not waited for at exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = partial(future.set_result, work())
        except BaseException as error:
            settle = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_unless_done, future, settle)

    threading.Thread(target=run, name=_NAME, daemon=True).start()
    return await future


def any_running() -> bool:
    """Whether such work is under way."""
    return any(thread.name in (_NAME, REBUILD) for thread in threading.enumerate())


def _unless_done[T](future: asyncio.Future[T], settle: partial[None]) -> None:
    if not future.done():
        settle()
