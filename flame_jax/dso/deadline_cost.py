"""Our policy: the cheapest batches that are in time, by what batches are known to cost."""

from __future__ import annotations

import math

from flame_jax.dso.backlog import Backlog
from flame_jax.dso.plans import Lanes, Plan, Planner, cheapest
from flame_jax.dso.policy import Costs, Launch, State, Wait
from flame_jax.fke.buckets import Ladder
from flame_jax.packing import Layout

LOOK = 48
"""Waiting requests looked at; those behind hardly change what is best for the first."""


class DeadlineCost:
    """Fewest late answers, then the least time that requests spend, summed over them.

    A launch always holds the most urgent request that can still be in time. It is chosen among these, played out
    with `costs` until nothing waits:

    - for each bucket, as many batches as lanes are idle, filled in order of urgency and no larger than it (so that
      a large request is split over lanes or in turns, and small ones share or spread);
    - for each number of idle lanes, all that waits spread over so many, each request whole.

    What waits for a lane is launched behind a running batch only if waiting has nothing to gain, or just in time to
    follow it. The last idle lane may be kept a little for company that is expected.

    Args:
        costs: what `seconds` says may change between decisions.
        max_wait: seconds after its submission for which a request's launch on an idle lane may be put off.
    """

    def __init__(self, ladder: Ladder, layout: Layout, costs: Costs, *, max_wait: float) -> None:
        self._ladder, self._layout, self._costs = ladder, layout, costs
        self._max_wait = max_wait

    def decide(self, state: State) -> Launch | Wait:
        """What to launch now, or until when to wait.

        Raises:
            ValueError: the first request's history leaves no room for a candidate in any bucket.
        """
        backlog = Backlog(state.waiting[:LOOK], state.now, self._ladder, self._layout)
        if state.idle:
            lanes = Lanes(state.lead, min(state.idle, state.places), state.busy, state.arrivals)
        else:
            # A batch launched now follows one that runs, in its place.
            start = max(state.lead, state.next_idle - state.now)
            lanes = Lanes(start, 1, max(0, state.busy - 1), state.arrivals)
        planner = Planner(backlog, self._ladder, self._costs, lanes)
        if not state.idle and (until := self._for_lane(state, backlog, planner)) > state.now:
            return Wait(until)
        plan = planner.best()
        if state.idle and (until := self._for_company(state, backlog, planner, plan)) > state.now:
            return Wait(until)
        return Launch(backlog.batches(plan.loads))

    def _for_lane(self, state: State, backlog: Backlog, planner: Planner) -> float:
        """When to launch what follows a running batch: at once if what waits fills the most efficient bucket.

        What even the least batch takes is mostly the host's, launching it and hearing of its end. That goes beside the
        batch before, if it is launched so much sooner.
        """
        prices = planner.prices(1)
        _, bucket = min(prices, key=lambda price: price[0] / price[1].tokens)
        (load,), rest = backlog.pack(backlog.items, self._ladder.index(bucket), 1)
        full = load.tokens == bucket.tokens or load.candidates == bucket.candidates
        if rest or full or load.requests == self._layout.max_requests or len(state.waiting) > LOOK:
            return state.now
        least, _ = prices[0]
        return state.next_idle - state.lead - least

    def _for_company(self, state: State, backlog: Backlog, planner: Planner, plan: Plan) -> float:
        """Until when the last idle lane is kept for one more request than wait."""
        (load, _), *others = plan.loads
        more = others or plan.rest or len(state.waiting) > LOOK
        if state.idle > 1 or more or plan.late or state.waiting[load.head].alone or not state.arrivals:
            return state.now
        history, candidates = backlog.mean
        prices = planner.prices(1)
        now, _ = cheapest(prices, load.tokens, load.candidates)
        own, _ = cheapest(prices, history + candidates, candidates)
        both, _ = cheapest(prices, load.tokens + history + candidates, load.candidates + candidates)
        if load.requests == self._layout.max_requests or both == math.inf:
            return state.now
        # One more comes after `gap`. Launch now: it waits until a lane is free, then takes a batch of its own. Wait
        # for it: all that wait lose the gap and what the batch grows by, and it shares their batch.
        gap = 1 / state.arrivals
        apart = max(0.0, now / (state.busy + 1) - gap) + own
        together = load.requests * (gap + both - now) + both
        if together >= apart:
            return state.now
        oldest = min(request.since for request in state.waiting)
        return min(oldest + self._max_wait, state.now + min(backlog.due) - state.lead - both)
