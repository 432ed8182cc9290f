"""What decides when a batch is launched, and of what: the interface of scheduling policies.

A policy is a pure function of what it is shown. The dispatcher and the simulator ask it whenever something changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from flame_jax.dso.batching import Batch
from flame_jax.packing import Bucket, Extent


class Waiting(NamedTuple):
    """A request that waits, or what is left of one.

    Attributes:
        extent: history rows, and candidates that no batch has taken yet.
        since: when it was submitted, in seconds on the clock of `State.now`.
        due: when its answer must be there.
        alone: it may share no batch: one that it was in has failed.
    """

    extent: Extent
    since: float
    due: float
    alone: bool = False


class State(NamedTuple):
    """What a policy sees.

    Attributes:
        now: seconds.
        waiting: the most urgent first; not empty, and none is past its due time.
        arrivals: requests submitted per second, of late.
        places: batches that can be launched now, one at least: each lane takes one that it runs and some that wait
            behind it on the device.
        idle: lanes that run nothing.
        busy: lanes that run something.
        next_idle: when a lane is expected to run nothing; `now` if one does.
        lead: seconds from `now` until what is launched can start to run.
    """

    now: float
    waiting: Sequence[Waiting]
    arrivals: float
    places: int
    idle: int
    busy: int
    next_idle: float
    lead: float = 0.0


class Launch(NamedTuple):
    """Launch these now, at most `State.places`, in this order.

    Attributes:
        batches: positions of their shares are of `State.waiting`; a request in several is served in their order.
    """

    batches: tuple[Batch, ...]


class Wait(NamedTuple):
    """Launch nothing: ask again when something changes, or at this time (infinity: not before)."""

    until: float


class Costs(Protocol):
    """How long batches take."""

    def seconds(self, bucket: Bucket, busy: int) -> float:
        """From launch to scores of one batch, while so many lanes run one, its own among them."""
        ...


class Policy(Protocol):
    """Decides what is launched next."""

    def decide(self, state: State) -> Launch | Wait:
        """What to do now."""
        ...
