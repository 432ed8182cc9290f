"""The paper's policy: fixed profiles, one request per batch, largest pieces first."""

from __future__ import annotations

from flame_jax.dso.batching import Batch, Share, no_room
from flame_jax.dso.policy import Launch, State, Wait, Waiting
from flame_jax.fke.buckets import Ladder, capacity
from flame_jax.packing import Bucket, Layout


class Descending:
    """First come, first served; every batch holds a piece of one request; never waits.

    A request is split over the buckets in descending order: each piece fills the bucket of the largest capacity
    that the candidates left over can fill. What fills none goes, padded, to the one of the smallest capacity.
    """

    def __init__(self, ladder: Ladder, layout: Layout) -> None:
        self._ladder, self._layout = ladder, layout

    def decide(self, state: State) -> Launch | Wait:
        """A piece for every place, as far as candidates go.

        Raises:
            ValueError: a history leaves no room for a candidate in any bucket.
        """
        order = sorted(range(len(state.waiting)), key=lambda position: state.waiting[position].since)
        batches: list[Batch] = []
        for position in order:
            batches += self._split(position, state.waiting[position], state.places - len(batches))
            if len(batches) == state.places:
                break
        return Launch(tuple(batches))

    def _split(self, position: int, request: Waiting, places: int) -> list[Batch]:
        """The request's first batches, as many as there are places for."""
        history, left = request.extent
        profiles = self._profiles(history)
        batches: list[Batch] = []
        while left and len(batches) < places:
            room, bucket = next((profile for profile in profiles if profile[0] <= left), profiles[-1])
            taken = min(room, left)
            batches.append(Batch(bucket, (Share(position, taken),)))
            left -= taken
        return batches

    def _profiles(self, history: int) -> list[tuple[int, Bucket]]:
        """Capacities beside a history and their buckets, the largest first; of equal ones the cheapest."""
        buckets: dict[int, Bucket] = {}
        for bucket in self._ladder:
            buckets.setdefault(capacity(bucket, history, self._layout), bucket)
        buckets.pop(0, None)
        if not buckets:
            raise no_room(history, self._ladder[-1])
        return sorted(buckets.items(), reverse=True)
