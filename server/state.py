"""What operators are told: every version that is live or on disk."""

from __future__ import annotations

import logging
from typing import NamedTuple

from flame_jax.fke.repository import RepositoryError, Version, natural_key
from flame_jax.server.models import STEPS, Models, Role
from flame_jax.server.reload import Reloader

log = logging.getLogger(__name__)


class VersionState(NamedTuple):
    """What is known of one version.

    Attributes:
        status: a role, or `available`, `withdrawn` or `bad`.
        share: of the users who name no version, in [0, 1].
        ok: calls answered since it got its role.
        failed: calls that ended by its own fault since then.
        reason: why it is bad.
    """

    version: str
    status: str
    share: float = 0.0
    in_flight: int = 0
    ok: int = 0
    failed: int = 0
    reason: str = ""


class State(NamedTuple):
    """What a server serves and could serve, newest version first.

    Attributes:
        pinned: the version that polling does not replace; empty: none.
    """

    model: str
    pinned: str
    versions: list[VersionState]


async def describe(models: Models, reloader: Reloader) -> State:
    """The state now."""
    try:
        on_disk = await reloader.on_disk()
    except RepositoryError as error:
        log.error("%s; only live versions are told", error)
        on_disk = []
    canary = models.share / STEPS
    shares = {Role.ACTIVE: 1 - canary, Role.CANARY: canary}
    rows = [
        VersionState(live.version, role, shares.get(role, 0.0), live.in_flight, live.ok, live.failed)
        for live, role in models
    ]
    shown = {row.version for row in rows}
    rows += [_on_disk(version, reloader) for version in on_disk if version.identity and version.name not in shown]
    rows.sort(key=lambda row: natural_key(row.version), reverse=True)
    return State(reloader.model, reloader.pinned, rows)


def _on_disk(version: Version, reloader: Reloader) -> VersionState:
    if reloader.is_bad(version):
        return VersionState(version.name, "bad", reason=reloader.bad[version.name][1])
    return VersionState(version.name, "withdrawn" if version.name in reloader.withdrawn else "available")
