"""Which versions are live, in which roles, and which one answers a call.

    load -> active -> standby -> draining -> freed
    load -> canary -> active, or draining

The only place that changes roles. Every change is one step on the event loop, so a call sees the state before or after
it, and stays until its end with the version that it was routed to.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from enum import StrEnum
from functools import partial

from flame_jax.server.background import in_background
from flame_jax.server.errors import Fault, RankError
from flame_jax.server.live import LiveModel

STEPS = 10_000
"""A split's share is a whole number of these parts."""
STOP_SECONDS = 5.0
"""After its last call, how long a version's dispatcher may take to finish what runs on the device."""
_LOOK_SECONDS = 0.01

log = logging.getLogger(__name__)


class Role(StrEnum):
    """What a live version does."""

    ACTIVE = "active"
    CANARY = "canary"
    STANDBY = "standby"
    DRAINING = "draining"


class Models:
    """The live versions of one model. Event loop only.

    Attributes:
        canary: serves `share` of the users.
        share: of the users, in parts of `STEPS`.
        standby: was active before, still loaded.
        draining: finish their calls.
    """

    def __init__(self) -> None:
        self._active: LiveModel | None = None
        self.canary: LiveModel | None = None
        self.share = 0
        self.standby: LiveModel | None = None
        self.draining: list[LiveModel] = []
        self._drains: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> LiveModel:
        """The version that users get. There is one before any call is routed."""
        assert self._active is not None, "nothing is loaded yet"
        return self._active

    def __iter__(self) -> Iterator[tuple[LiveModel, Role]]:
        for live, role in ((self._active, Role.ACTIVE), (self.canary, Role.CANARY), (self.standby, Role.STANDBY)):
            if live is not None:
                yield live, role
        for live in self.draining:
            yield live, Role.DRAINING

    def route(self, version: str, user: str) -> LiveModel:
        """Who answers a call: the version it names, else the user's. Raises RankError for a version not live."""
        if version:
            for live in (self._active, self.canary, self.standby):
                if live is not None and live.version == version:
                    return live
            raise RankError(Fault.UNKNOWN_VERSION)
        if self.canary is not None and user_step(user) < self.share:
            return self.canary
        return self.active

    def promote(self, live: LiveModel) -> None:
        """Make a new version, the canary or the standby active, and keep the one before as the standby."""
        before = self._active
        if live is self.canary:
            self.canary, self.share = None, 0
        elif live is self.standby:
            self.standby = None
        self.end_standby()
        live.ok = live.failed = 0
        self._active, self.standby = live, before

    def revert(self) -> None:
        """Make the standby active again and let go of the version left."""
        assert self.standby is not None, "nothing to go back to"
        left, self._active, self.standby = self.active, self.standby, None
        self._drain(left)

    def split(self, live: LiveModel, share: int) -> None:
        """Give a new version, the standby or the canary `share` of the users, in parts of `STEPS`."""
        if live is not self.canary:
            self.end_split()
            live.ok = live.failed = 0
        if live is self.standby:
            self.standby = None
        self.canary, self.share = live, share

    def end_split(self) -> None:
        """Every user gets the active version."""
        left, self.canary, self.share = self.canary, None, 0
        if left is not None:
            self._drain(left)

    def end_standby(self) -> None:
        """Let go of the version before."""
        left, self.standby = self.standby, None
        if left is not None:
            self._drain(left)

    async def stop(self) -> bool:
        """End the threads of every version, once no calls are left; False when the device hangs."""
        ended = await asyncio.gather(*(in_background(partial(live.stop, STOP_SECONDS)) for live, _ in self))
        return all(ended)

    def _drain(self, live: LiveModel) -> None:
        self.draining.append(live)
        task = asyncio.get_running_loop().create_task(self._finish(live))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    async def _finish(self, live: LiveModel) -> None:
        """Wait for its calls, end its threads, and drop the last reference, which frees its device memory."""
        while live.in_flight:
            await asyncio.sleep(_LOOK_SECONDS)
        if not await in_background(partial(live.stop, STOP_SECONDS)):
            log.error("version %s: a batch did not finish: the device hangs", live.version)
        self.draining.remove(live)
        log.info("version %s is drained and freed", live.version)


def user_step(user: str) -> int:
    """Where in [0, STEPS) a user lies: the same in every process."""
    digest = hashlib.blake2b(user.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % STEPS
