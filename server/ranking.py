"""`flame.v1.RankingService`: one call from bytes to bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
import numpy as np

from flame_jax.config import ServerConfig
from flame_jax.dso.scheduler import NoLane, Refused
from flame_jax.dso.work import Done, Status
from flame_jax.pda.assembler import Assembled
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.records import CorruptRecord
from flame_jax.pda.store import StoreError
from flame_jax.request import RankRequest
from flame_jax.server.errors import Fault, RankError
from flame_jax.server.live import LiveModel
from flame_jax.server.metrics import Metrics
from flame_jax.server.models import Models
from flame_jax.server.proto import ranking_pb2
from flame_jax.server.validation import parse

log = logging.getLogger(__name__)

SERVICE = "flame.v1.RankingService"

# Faults of the server's own making; every other one is the caller's or the load's.
_ERRORS = {Fault.STORE_UNAVAILABLE, Fault.CORRUPT_RECORD, Fault.BAD_SCORES, Fault.INTERNAL}
# Of these, the ones that speak against the version: it gave no scores, or none that are numbers.
_OWN_FAULTS = {Fault.BAD_SCORES.name, Fault.INTERNAL.name}
_FAULTS = {
    Status.EXPIRED: Fault.DEADLINE_EXCEEDED,
    Status.REFUSED: Fault.OVERLOADED,
    Status.NOT_FINITE: Fault.BAD_SCORES,
    Status.FAILED: Fault.INTERNAL,
}
_YEAR_SECONDS = 365 * 86400.0


class _Call:
    """One call on its way.

    Attributes:
        live: the version that it was routed to.
    """

    __slots__ = ("deadline", "live", "started")

    def __init__(self, started: int, deadline: int) -> None:
        self.started, self.deadline = started, deadline
        self.live: LiveModel | None = None


class RankingService:
    """Answers calls by the versions that are live.

    Args:
        model: name of the model served.
        on_failed: told when a call ended by the fault of the version that it was routed to.
    """

    def __init__(
        self,
        *,
        model: str,
        models: Models,
        config: ServerConfig,
        query: FeatureQuery,
        metrics: Metrics,
        on_failed: Callable[[LiveModel], None],
    ) -> None:
        self._model, self._models, self._config, self._query = model, models, config, query
        self._metrics, self._on_failed = metrics, on_failed
        self.draining = False
        self.in_flight = self.calls = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """The service with raw-bytes methods: a malformed message reaches our code, not gRPC's parser."""
        return grpc.method_handlers_generic_handler(SERVICE, {"Rank": grpc.unary_unary_rpc_method_handler(self.rank)})

    async def rank(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Answer one call; whatever happens, it ends in one status and is counted once."""
        started = time.monotonic_ns()
        remaining = context.time_remaining()
        seconds = self._config.default_timeout_ms / 1e3 if remaining is None else min(remaining, _YEAR_SECONDS)
        call = _Call(started, started + int(seconds * 1e9))
        self._metrics.accepted()
        self.in_flight += 1
        self.calls += 1
        try:
            async with asyncio.timeout(seconds):
                answer = await self._answer(message, call)
            data = answer.SerializeToString()
            self._finished(call, "degraded" if answer.flags.degraded else "ok", "OK")
            return data
        except RankError as error:
            fault = error.fault
        except TimeoutError:
            fault = Fault.DEADLINE_EXCEEDED
        except asyncio.CancelledError:
            # gRPC cancels the handler when the caller goes away and when the caller's deadline passes.
            if time.monotonic_ns() >= call.deadline:
                self._finished(call, "expired", Fault.DEADLINE_EXCEEDED.name)
            else:
                self._finished(call, "cancelled", "CANCELLED")
            raise
        except Exception:
            log.exception("a call failed")
            fault = Fault.INTERNAL
        finally:
            self.in_flight -= 1
        self._finished(call, _outcome(fault), fault.name)
        await context.abort(fault.status, fault.details)
        raise AssertionError("abort raises")

    def _finished(self, call: _Call, outcome: str, code: str) -> None:
        """Count a call that has ended, once, and let its version go."""
        live = call.live
        self._metrics.finished(outcome, code, live.version if live else "")
        if live is None:
            return
        live.in_flight -= 1
        live.ok += outcome in ("ok", "degraded")
        if code in _OWN_FAULTS:
            live.failed += 1
            self._on_failed(live)

    async def _answer(self, message: bytes, call: _Call) -> ranking_pb2.RankResponse:
        if self.draining:
            raise RankError(Fault.DRAINING)
        if self.in_flight > self._config.max_in_flight:
            raise RankError(Fault.OVERLOADED)
        if call.deadline <= call.started:
            raise RankError(Fault.DEADLINE_EXCEEDED)
        wire = parse(message)
        if wire.model not in ("", self._model):
            raise RankError(Fault.UNKNOWN_MODEL)
        live = call.live = self._models.route(wire.version, wire.user)
        live.in_flight += 1
        request = live.validator.request(wire)
        decoded = time.monotonic_ns()
        if call.deadline <= decoded:
            raise RankError(Fault.DEADLINE_EXCEEDED)
        assembled = await self._features(live, request)
        assembled_at = time.monotonic_ns()
        done = await self._score(live, assembled.record, call.deadline, request.traffic_class)
        scored = time.monotonic_ns()
        answer = self._respond(live, request, wire.request_id, assembled, done)
        encoded = time.monotonic_ns()
        stages = {
            "decode": decoded - call.started,
            "features": assembled_at - decoded,
            "queue": done.queue_ns,
            "assemble": done.assemble_ns,
            "compute": done.compute_ns,
            "encode": encoded - scored,
            "total": encoded - call.started,
        }
        for stage, nanoseconds in stages.items():
            setattr(answer.timings, f"{stage}_us", nanoseconds // 1000)
        answer.timings.batches = done.batches
        self._metrics.stages(stages)
        return answer

    async def _features(self, live: LiveModel, request: RankRequest) -> Assembled:
        try:
            wanted = request.candidates if live.schema.fetches_items else request.candidates[:0]
            fetched = await self._query.fetch(request.user, wanted)
        except StoreError as error:
            log.debug("%s", error)  # the store itself has said what is wrong
            raise RankError(Fault.STORE_UNAVAILABLE) from None
        except CorruptRecord:
            log.exception("the store holds a damaged record")
            raise RankError(Fault.CORRUPT_RECORD) from None
        assembled = live.assembler.assemble(request, fetched)
        if self._config.strict_ids and assembled.report.unknown_user:
            raise RankError(Fault.UNKNOWN_USER)
        if self._config.strict_ids and assembled.report.unknown_items:
            raise RankError(Fault.UNKNOWN_ITEM)
        return assembled

    async def _score(self, live: LiveModel, record: np.ndarray, deadline: int, traffic_class: int) -> Done:
        ticket, future = live.inbox.open()
        try:
            live.dispatcher.submit(ticket, record, deadline, traffic_class)
            done = await future
        except Refused as refused:
            live.records.give(record)
            raise RankError(Fault.INTERNAL if isinstance(refused, NoLane) else Fault.OVERLOADED) from None
        except asyncio.CancelledError:
            live.dispatcher.cancel(ticket)
            raise
        finally:
            live.inbox.close(ticket)
        if done.status is not Status.OK:
            raise RankError(_FAULTS[done.status])
        return done

    def _respond(
        self, live: LiveModel, request: RankRequest, request_id: str, assembled: Assembled, done: Done
    ) -> ranking_pb2.RankResponse:
        scores, report = done.scores, assembled.report
        assert scores is not None, "an OK result has scores"
        answer = ranking_pb2.RankResponse(model=self._model, version=live.version, request_id=request_id)
        columns = np.ascontiguousarray(scores.T, "<f4")
        for task in request.tasks:
            answer.scores.add(task=live.schema.tasks[task], values=columns[task].tobytes())
        if request.top_k:
            first = columns[request.tasks[0]]
            best = np.argsort(-first, kind="stable")[: request.top_k]
            answer.top.task = live.schema.tasks[request.tasks[0]]
            answer.top.item_ids = request.candidates[best].astype("<i8").tobytes()
            answer.top.values = first[best].tobytes()
        flags = answer.flags
        flags.degraded, flags.unknown_user = report.degraded, report.unknown_user
        flags.truncated_history = report.truncated_history
        flags.unknown_items, flags.missing_items = report.unknown_items, report.missing_items
        self._metrics.answered(
            scores.size,
            truncated=report.truncated_history,
            unknown_user=report.unknown_user,
            unknown_items=report.unknown_items,
        )
        return answer


def _outcome(fault: Fault) -> str:
    if fault is Fault.DEADLINE_EXCEEDED:
        return "expired"
    return "error" if fault in _ERRORS else "rejected"
