"""A stand-in for the executor: it fills a real slot, and its scores are what a candidate's rows in the slot say."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from flame_jax.dso.batching import next_batch
from flame_jax.dso.costs import CostModel
from flame_jax.dso.dispatcher import Dispatcher
from flame_jax.dso.executor import Executor, Scored
from flame_jax.dso.policy import Launch, State
from flame_jax.dso.scheduler import Limits, Scheduler
from flame_jax.dso.work import Done, Status
from flame_jax.packing import Bucket, Extent, Layout, place, slot_layout
from flame_jax.record import BlockEvents, Piece, RecordLayout
from flame_jax.schema import Block, Feature, FeatureSchema

SCHEMA = FeatureSchema(
    tasks=("item", "request"), actions=2, blocks=(Block("all"), Block("one", (1,))), block_length=16,
    item_features=(Feature("weight", "numeric"),),
)  # fmt: skip
RECORDS = RecordLayout(SCHEMA)
LAYOUT = Layout(align=4, max_requests=4)
SMALL, LARGE = Bucket(16, 8), Bucket(64, 32)
LADDER = (SMALL, LARGE)
PATIENCE = 20.0
"""Seconds after which a test gives up on something that should happen at once."""
STAGES = ("fill", "launch", "scores")
"""Of a batch."""


def record(ticket: int, *, history: int = 3, candidates: int = 4) -> np.ndarray:
    """A request whose candidate k is item 1000 * ticket + k and whose time is its ticket."""
    blocks = [BlockEvents(*(np.zeros(n, np.int32) for _ in range(3))) for n in (history, history // 2)]
    items = np.arange(candidates, dtype=np.int32)
    return RECORDS.encode(
        scenario=0,
        request_time=ticket,
        request_words=np.zeros(0, np.int32),
        blocks=blocks,
        candidates=1000 * ticket + items,
        item_columns=[(items / np.float32(8)).astype(np.float32).view(np.int32)],
    )


def expected(ticket: int, candidates: int = 4) -> np.ndarray:
    """The scores of `record(ticket)`."""
    items = np.arange(candidates)
    return np.stack([1000 * ticket + items + items / 8, np.full(candidates, ticket)], 1).astype(np.float32)


class Death(BaseException):
    """Not an Exception: it ends the thread it is raised in."""


@dataclass
class Lab:
    """What the fake executors of one test share.

    Attributes:
        failing: errors to raise, by stage (`fill`, `launch`, `scores`) and by a ticket in the batch, each once.
        batches: (ticket, low, high) of every piece of every batch filled, in order.
        buckets: their buckets.
        lanes: their lanes.
        broken_lanes: launches on these lanes raise.
        broken: rules of the interface that were broken.
        jitter: seconds a launched batch takes at most.
    """

    open: bool = True
    passes: int = 0
    failing: dict[tuple[str, int], list[BaseException]] = field(default_factory=dict)
    batches: list[list[tuple[int, int, int]]] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    broken_lanes: set[int] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    jitter: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def plan(self, stage: str, ticket: int, *errors: BaseException) -> None:
        """Raise these when batches with this request reach this stage."""
        self.failing[stage, ticket] = list(errors)

    def fail(self, stage: str, tickets: Iterable[int]) -> None:
        """Raise what is planned, if anything."""
        for ticket in tickets:
            if errors := self.failing.get((stage, ticket)):
                raise errors.pop()

    def let(self, open: bool) -> None:
        """Let batches end, or hold them in flight."""
        with self.changed:
            self.open = open
            self.changed.notify_all()

    def let_one(self) -> None:
        """Let one batch end."""
        with self.changed:
            self.passes += 1
            self.changed.notify_all()

    def wait_turn(self) -> None:
        """Wait until the calling batch may end."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.open or self.passes, PATIENCE)
            self.passes -= not self.open

    def wait_batches(self, count: int) -> None:
        """Wait until this many batches have been filled."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.batches) >= count, PATIENCE), self.batches

    def filled(self) -> list[int]:
        """Tickets in the order they were first filled."""
        return list(dict.fromkeys(ticket for batch in self.batches for ticket, _, _ in batch))


class FakeExecutor(Executor):
    """Same interface, no engine."""

    def __init__(self, bucket: Bucket, lab: Lab, lane: int = 0) -> None:
        self.bucket, self.lane = bucket, lane
        self._lab = lab
        self._slot_layout = slot_layout(SCHEMA, LAYOUT, bucket)
        self._state = "free"
        self._owner = threading.Lock()

    def fill(self, pieces: Sequence[Piece]) -> None:
        with self._only("fill"):
            if self._state == "launched":
                self._lab.broken.append("filled before its scores were read")
            self._state = "filled"
            self._tickets = [int(piece.record[2]) for piece in pieces]
            self._lab.fail("fill", self._tickets)
            extents = [Extent(RECORDS.extent(piece.record).history, piece.high - piece.low) for piece in pieces]
            self._words = np.zeros(self._slot_layout.words, np.int32)
            fields = self._slot_layout.views(self._words)
            self._places, self._extents = place(extents, self.bucket, LAYOUT), extents
            for row, (where, piece) in enumerate(zip(self._places, pieces, strict=True)):
                RECORDS.write(fields, row, where, *piece)
            with self._lab.changed:
                self._lab.buckets.append(self.bucket)
                self._lab.lanes.append(self.lane)
                self._lab.batches.append([(t, p.low, p.high) for t, p in zip(self._tickets, pieces, strict=True)])
                self._lab.changed.notify_all()

    def launch(self) -> None:
        with self._only("launch"):
            if self._state != "filled":
                self._lab.broken.append(f"launched while {self._state}")
            self._lab.fail("launch", self._tickets)
            if self.lane in self._lab.broken_lanes:
                raise RuntimeError("the lane is broken")
            self._state = "launched"

    def scores(self) -> list[Scored]:
        with self._only("scores"):
            if self._state != "launched":
                self._lab.broken.append(f"read while {self._state}")
            self._lab.wait_turn()
            if self._lab.jitter:
                time.sleep(self._lab.jitter * (hash(self._words.tobytes()) % 8) / 8)
            self._state = "free"
            self._lab.fail("scores", self._tickets)
            fields = self._slot_layout.views(self._words)
            base, answers = self.bucket.tokens - self.bucket.candidates, []
            for where, extent in zip(self._places, self._extents, strict=True):
                tokens = slice(where.candidate_start, where.candidate_start + extent.candidates)
                rows = slice(tokens.start - base, tokens.stop - base)
                item = fields["item"][0, tokens] + fields["item.weight"][rows]
                values = np.stack([item, fields["time"][0, tokens]], 1).astype(np.float32)
                answers.append(Scored(values, bool(np.isfinite(values).all())))
            self._words = np.full_like(self._words, -1)
            return answers

    @contextmanager
    def _only(self, what: str) -> Iterator[None]:
        if not self._owner.acquire(blocking=False):
            self._lab.broken.append(f"{what} during another call")
            yield
            return
        try:
            yield
        finally:
            self._owner.release()


def fake_lane(lab: Lab, executors: int = 1, number: int = 0) -> list[Executor]:
    """The executors of one lane."""
    return [FakeExecutor(bucket, lab, number) for bucket in LADDER for _ in range(executors)]


class Greedy:
    """A policy that launches what it can as soon as it can, the most urgent first."""

    def decide(self, state: State) -> Launch:
        first, *others = state.waiting
        together = [] if first.alone else [(n, w.extent) for n, w in enumerate(others, start=1) if not w.alone]
        numbers = [0, *(n for n, _ in together)]
        batch = next_batch([first.extent, *(extent for _, extent in together)], LADDER, LAYOUT)
        shares = tuple(share._replace(position=numbers[share.position]) for share in batch.shares)
        return Launch((batch._replace(shares=shares),))


def scheduler(
    *,
    lanes: int = 1,
    depth: int = 1,
    limits: Limits | None = None,
    costs: CostModel | None = None,
    on_left: Callable[[np.ndarray], None] = lambda record: None,
) -> Scheduler:
    """The books of a dispatcher over fake executors; batches are expected to take no time to speak of."""
    costs = costs or CostModel({bucket: [1e-6] for bucket in LADDER})
    limits = limits or Limits(max_queue=1000, target_wait=60.0)
    return Scheduler(LADDER, LAYOUT, costs, Greedy(), limits, lanes=lanes, depth=depth, on_left=on_left)


class Desk:
    """A dispatcher over fake executors, and everything it answered.

    Attributes:
        fatal: how often the dispatcher said that a thread died.
        given: records that it gave back, of which each is given once.
    """

    def __init__(
        self,
        *,
        executors: int = 1,
        lanes: int = 1,
        max_queue: int = 1000,
        open: bool = True,
        limits: Limits | None = None,
        rebuild: Callable[[int], Sequence[Executor]] | None = None,
        hang_seconds: float = math.inf,
    ) -> None:
        self.lab = Lab(open)
        self.done: list[Done] = []
        self.fatal = 0
        self.on_done_error: BaseException | None = None
        self._changed = threading.Condition()
        self.given: list[int] = []
        self._submitted: set[int] = set()
        limits = limits or Limits(max_queue=max_queue, target_wait=60.0)
        self.dispatcher = Dispatcher(
            [fake_lane(self.lab, executors, lane) for lane in range(lanes)],
            scheduler(lanes=lanes, depth=executors, limits=limits, on_left=lambda r: self.given.append(int(r[2]))),
            RECORDS,
            on_done=self._on_done,
            on_fatal=self._on_fatal,
            rebuild=rebuild,
            hang_seconds=hang_seconds,
        )

    def _on_done(self, done: list[Done]) -> None:
        with self._changed:
            self.done += done
            self._changed.notify_all()
        if self.on_done_error is not None:
            raise self.on_done_error

    def _on_fatal(self) -> None:
        with self._changed:
            self.fatal += 1
            self._changed.notify_all()

    def submit(self, ticket: int, *, history: int = 3, candidates: int = 4, seconds: float = 1e4) -> int:
        """Submit `record(ticket)`, due in some seconds, and return its deadline."""
        deadline = time.monotonic_ns() + int(seconds * 1e9)
        self.hand_in(ticket, record(ticket, history=history, candidates=candidates), deadline)
        return deadline

    def hand_in(self, ticket: int, request: np.ndarray, deadline: int, traffic_class: int = 0) -> None:
        """Submit a record, and remember that it is to come back."""
        self.dispatcher.submit(ticket, request, deadline, traffic_class)
        self._submitted.add(ticket)

    def block(self, ticket: int = 999) -> None:
        """Put one batch in flight that ends only when the lab opens; with one executor per bucket all else waits."""
        batches = len(self.lab.batches)
        self.submit(ticket)
        self.lab.wait_batches(batches + 1)

    def wait(self, *tickets: int) -> dict[int, Done]:
        """Wait until these have been answered; all answers so far, none twice."""
        with self._changed:
            answered = self._changed.wait_for(
                lambda: set(tickets) <= {done.ticket for done in self.done} or self.fatal, PATIENCE
            )
        assert answered, f"only {sorted(done.ticket for done in self.done)} were answered"
        return self.answers()

    def wait_fatal(self) -> None:
        """Wait until a thread died."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.fatal, PATIENCE)

    def answers(self) -> dict[int, Done]:
        """Answers by ticket, none twice."""
        answers = {done.ticket: done for done in self.done}
        assert len(answers) == len(self.done), "a request was answered twice"
        return answers

    def stop(self) -> None:
        """Stop the dispatcher; fails when it doesn't end."""
        stopper = threading.Thread(target=self.dispatcher.stop, daemon=True)
        stopper.start()
        stopper.join(PATIENCE)
        assert not stopper.is_alive(), "the dispatcher does not stop"

    def finish(self) -> dict[int, Done]:
        """Let every batch end, stop, and check what must hold of every run."""
        self.lab.let(True)
        self.stop()
        assert self.lab.broken == []
        assert self.fatal == 0
        assert len(set(self.given)) == len(self.given), "a record was given back twice"
        assert set(self.given) == self._submitted, "a record did not come back"
        return self.answers()


def ok(done: Done, candidates: int = 4) -> bool:
    """Whether this is the right answer to `record(done.ticket)`."""
    if done.status is not Status.OK or done.scores is None:
        return False
    return done.scores.dtype == np.float32 and np.array_equal(done.scores, expected(done.ticket, candidates))


def wait_until(deadline_ns: int) -> None:
    """Until the clock of time.monotonic_ns() has passed it."""
    while (left := deadline_ns - time.monotonic_ns()) >= 0:
        time.sleep(left / 1e9 + 1e-4)
