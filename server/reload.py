"""When another version is loaded, and what becomes of the one before: commands, polling, automatic rollback.

One change at a time. Loading runs beside serving; roles change (`Models`) only once a version is loaded and warm.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial

from flame_jax.config import ServerConfig
from flame_jax.fke.repository import RepositoryError, Source, Version, natural_key
from flame_jax.server.background import in_background
from flame_jax.server.errors import CommandRefused, Refusal
from flame_jax.server.live import LiveModel, LoadError
from flame_jax.server.metrics import Metrics
from flame_jax.server.models import STEPS, STOP_SECONDS, Models

LEAST_FAILED = 5
"""Failed calls after which a version is judged: it goes when they are more than half of its calls."""

log = logging.getLogger(__name__)


class Reloader:
    """Changes what is served. Event loop only.

    Args:
        load: loads and warms a version of a model (any when empty), on a thread. Raises LoadError.
        on_dead: called when the active version died and there is none to go back to.

    Attributes:
        model: name of the model served.
        pinned: the version that polling does not replace; empty: none.
        bad: version -> the identity (`repository.Version`) that failed, and why.
        withdrawn: versions left by a rollback or a split that ended, which only their name brings back.
    """

    def __init__(
        self,
        source: Source,
        load: Callable[[Version, str, bool], LiveModel],
        models: Models,
        metrics: Metrics,
        config: ServerConfig,
        on_dead: Callable[[], None],
    ) -> None:
        self._source, self._load_model, self._models, self._metrics = source, load, models, metrics
        self._config, self._on_dead = config, on_dead
        self.model, self.pinned = source.model, config.version
        self.bad: dict[str, tuple[str, str]] = {}
        self.withdrawn: set[str] = set()
        self._turn = asyncio.Lock()
        self._window: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()

    async def start(self) -> None:
        """Load what is served first: the pinned version or the newest good one, and the canary.

        Raises:
            LoadError: nothing can be served, or the pinned version or the canary can't.
            RepositoryError: the repository can't be read.
        """
        pinned, canary = self._config.version, self._config.canary
        on_disk = await self.on_disk()
        names = [version.name for version in on_disk]
        for setting, name in (("version", pinned), ("canary", canary)):
            if name and name not in names:
                held = ", ".join(names) or "none"
                raise LoadError(f"server.{setting}: model {self.model} has no version {name!r}; it has {held}")
        wanted = [v for v in on_disk if v.name == pinned or (not pinned and v.name != canary)]
        self._promote(await self._first_good(wanted))
        self.model = self._models.active.manifest.model.name
        if canary:
            live = await self._first_good([v for v in on_disk if v.name == canary])
            self._models.split(live, _steps(self._config.canary_share))

    async def _first_good(self, versions: Iterable[Version]) -> LiveModel:
        tried = {}
        for version in versions:
            try:
                return await self._load(version)
            except LoadError as error:
                tried[version.name] = str(error)
        raise LoadError(self._source.refusal(tried))

    async def watch(self) -> None:
        """Take newer versions as they come, for ever."""
        told = ""
        while True:
            await asyncio.sleep(self._config.poll_seconds)
            try:
                await self.poll()
                told = ""
            except RepositoryError as error:
                if str(error) != told:
                    told = str(error)
                    log.error("%s; what is loaded stays served", told)
            except CommandRefused:
                return
            except Exception:
                log.exception("looking for a newer version failed")

    async def poll(self) -> None:
        """Serve the newest good version that is newer than the active one.

        Not while one is pinned, users are split, or the newest change is still on trial.
        """
        if self.pinned or self._models.canary or self._models.standby or self._turn.locked():
            return
        async with self._turn:
            for version in await self._eligible(newer_than=self._models.active.version):
                try:
                    self._promote(await self._reload(version))
                    return
                except LoadError:
                    continue

    async def load(self, name: str) -> None:
        """Serve a version to every user and pin it, or, without a name, the newest good one and pin none.

        Raises:
            CommandRefused: there is no such version, or it is bad; the active one stays.
            RepositoryError: the repository can't be read; likewise for the other commands.
        """
        async with self._turn:
            if name:
                await self._serve_or_refuse(await self._find(name))
                self.pinned = name
                self.withdrawn.discard(name)
                return
            for version in await self._eligible():
                try:
                    await self._serve(version)
                except LoadError:
                    continue
                self.pinned = ""
                return
            reasons = {v.name: self.bad[v.name][1] for v in await self.on_disk() if self.is_bad(v)}
            raise CommandRefused(Refusal.NO_GOOD_VERSION, self._source.refusal(reasons))

    async def rollback(self) -> None:
        """Go back to the standby at once, else to the newest good version older than the active one.

        Raises:
            CommandRefused: there is none.
        """
        async with self._turn:
            left = self._models.active.version
            if self._models.standby is not None:
                self._end_split()
                self._revert("command")
            else:
                await self._load_older()
                self._metrics.rollback("command")
            self.withdrawn.add(left)
            log.warning("rolled back from version %s to %s on command", left, self._models.active.version)

    async def _load_older(self) -> None:
        newest = natural_key(self._models.active.version)
        for version in [v for v in await self._eligible() if natural_key(v.name) < newest]:
            self._make_room()
            try:
                self._promote(await self._reload(version))
            except LoadError:
                continue
            self._models.end_standby()  # it was left on purpose
            self.pinned = self.pinned and version.name
            return
        reason = f"no good version is older than {self._models.active.version}"
        raise CommandRefused(Refusal.NO_OLDER_VERSION, reason)

    async def split(self, name: str, share: float) -> None:
        """Give `share` of the users, in (0, 1], a second version; 0 ends the split.

        Raises:
            CommandRefused: the share is out of range, or the version can't be the canary.
        """
        async with self._turn:
            models = self._models
            if share == 0:
                if models.canary is None or name not in ("", models.canary.version):
                    raise CommandRefused(Refusal.NO_SPLIT, f"users are not split with version {name or 'any'}")
                self._end_split()
                return
            if not 1 <= _steps(share) <= STEPS:
                raise CommandRefused(Refusal.BAD_SHARE, f"share must be 0 or lie in [{1 / STEPS}, 1], not {share}")
            if name == models.active.version:
                raise CommandRefused(Refusal.IS_ACTIVE, f"version {name} is what the other users get")
            live = next((live for live in (models.canary, models.standby) if live and live.version == name), None)
            if live is None:
                version = await self._find(name)
                self._make_room()
                try:
                    live = await self._reload(version)
                except LoadError as error:
                    raise CommandRefused(Refusal.BAD_VERSION, str(error)) from None
            if live is not models.canary:
                self._end_split()
            models.split(live, _steps(share))
            self.withdrawn.discard(name)
            log.info("version %s serves %g of the users", name, share)

    def failed(self, live: LiveModel) -> None:
        """A call ended by this version's own fault: judge it while there is another one to serve instead."""
        if live.failed < LEAST_FAILED or 2 * live.failed <= live.ok + live.failed:
            return
        self._drop(live, "failing", f"{live.failed} of its {live.ok + live.failed} calls failed")

    def died(self, live: LiveModel) -> None:
        """A thread of its dispatcher died: it answers no more."""
        if live is self._models.active and self._models.standby is None:
            self._on_dead()
        elif live is self._models.standby:
            self._models.end_standby()
        else:
            self._drop(live, "died", "its dispatcher died")

    def close(self) -> None:
        """Change nothing from now on; what is being loaded is dropped."""
        self._closed.set()
        if self._window is not None:
            self._window.cancel()

    async def on_disk(self, newer_than: str | None = None) -> list[Version]:
        """Versions on disk, newest first. Raises RepositoryError."""
        return await in_background(partial(self._source.versions, newer_than))

    def is_bad(self, version: Version) -> bool:
        """Whether it failed, and has not changed since."""
        return version.name in self.bad and self.bad[version.name][0] == version.identity

    async def _eligible(self, newer_than: str | None = None) -> list[Version]:
        """What may be served without being named, newest first; a bad version that has changed is tried again."""
        return [v for v in await self.on_disk(newer_than) if v.name not in self.withdrawn and not self.is_bad(v)]

    async def _find(self, name: str) -> Version:
        version = await in_background(partial(self._source.find, name))
        if version is None:
            raise CommandRefused(Refusal.UNKNOWN_VERSION, f"model {self.model} has no version {name[:200]!r}")
        return version

    async def _serve_or_refuse(self, version: Version) -> None:
        try:
            await self._serve(version)
        except LoadError as error:
            raise CommandRefused(Refusal.BAD_VERSION, str(error)) from None

    async def _serve(self, version: Version) -> None:
        """Serve it to every user, without loading it where it is live."""
        models, wanted = self._models, (version.name, version.identity)
        live = next(
            (
                live
                for live in (models.active, models.canary, models.standby)
                if live and (live.version, live.identity) == wanted
            ),
            None,
        )
        if live is None:
            self._make_room()
            live = await self._reload(version)
        if live is not models.canary:
            self._end_split()
        if live is not models.active:
            self._promote(live)

    def _make_room(self) -> None:
        """Before a load: no more than two versions are to be on the device, besides those that finish their calls."""
        self._end_split()
        self._models.end_standby()

    async def _reload(self, version: Version) -> LiveModel:
        if self._closed.is_set():
            raise CommandRefused(Refusal.DRAINING, "the server is shutting down")
        try:
            live = await self._load(version, beside=True)
        except LoadError:
            self._metrics.reload("failed")
            raise
        if self._closed.is_set():
            await in_background(partial(live.stop, STOP_SECONDS))
            raise CommandRefused(Refusal.DRAINING, "the server is shutting down")
        self._metrics.reload("ok")
        return live

    async def _load(self, version: Version, *, beside: bool = False) -> LiveModel:
        log.info("loading version %s", version.name)
        begun = time.monotonic()
        try:
            live = await in_background(partial(self._load_model, version, self.model, beside))
        except LoadError as error:
            self._mark_bad(version.name, version.identity, str(error))
            raise
        self.bad.pop(version.name, None)
        seconds = time.monotonic() - begun
        self._metrics.loaded(live.version, live.dispatcher.launched, seconds)
        log.info("version %s is loaded and warm after %.1f s", version.name, seconds)
        return live

    def _promote(self, live: LiveModel) -> None:
        models = self._models
        models.promote(live)
        self._metrics.model(live.manifest, live.memory, live.lanes)
        if self._window is not None:
            self._window.cancel()
        if models.standby is None:
            return
        log.info("version %s is active, version %s stays loaded", live.version, models.standby.version)
        # Also with 0 seconds through the loop: one way to end a trial.
        loop = asyncio.get_running_loop()
        self._window = loop.call_later(self._config.rollback_seconds, models.end_standby)

    def _revert(self, reason: str) -> None:
        self._models.revert()
        active = self._models.active
        self._metrics.model(active.manifest, active.memory, active.lanes)
        self._metrics.rollback(reason)
        self.pinned = self.pinned and self._models.active.version

    def _end_split(self) -> None:
        if self._models.canary is not None:
            log.info("version %s no longer serves a share of the users", self._models.canary.version)
            self.withdrawn.add(self._models.canary.version)
            self._models.end_split()

    def _drop(self, live: LiveModel, kind: str, reason: str) -> None:
        """Take a version that fails out of service, where another one can serve its users."""
        if live is self._models.active and self._models.standby is not None:
            self._revert(kind)
            log.error("version %s: %s; version %s is active again", live.version, reason, self._models.active.version)
        elif live is self._models.canary:
            self._models.end_split()
        else:
            return
        self._mark_bad(live.version, live.identity, reason)

    def _mark_bad(self, version: str, identity: str, reason: str) -> None:
        self.bad[version] = (identity, reason)
        self._metrics.bad_version()
        log.warning("version %s is bad: %s", version, reason)


def _steps(share: float) -> int:
    """A share in parts of STEPS; -1 for what is no number."""
    return round(share * STEPS) if math.isfinite(share) else -1
