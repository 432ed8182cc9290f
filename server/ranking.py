"""`flame.v1.RankingService`: one call from bytes to bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import count

import grpc
import numpy as np

from flame_jax.config import ServerConfig
from flame_jax.dso.dispatcher import Dispatcher, Done, QueueFull, Status
from flame_jax.pda.assembler import Assembled, Assembler
from flame_jax.pda.records import CorruptRecord
from flame_jax.pda.store import Store, StoreError
from flame_jax.request import RankRequest
from flame_jax.schema import FeatureSchema
from flame_jax.server.errors import Fault, RankError
from flame_jax.server.metrics import Metrics
from flame_jax.server.proto import ranking_pb2
from flame_jax.server.validation import Validator

log = logging.getLogger(__name__)

SERVICE = "flame.v1.RankingService"

# Faults of the server's own making; every other one is the caller's or the load's.
_ERRORS = {Fault.STORE_UNAVAILABLE, Fault.CORRUPT_RECORD, Fault.BAD_SCORES, Fault.INTERNAL}
_YEAR_SECONDS = 365 * 86400.0


class Inbox:
    """Brings finished requests from the completion thread to the event loop, one wake-up per batch."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._futures: dict[int, asyncio.Future[Done]] = {}
        self._tickets = count()

    def open(self) -> tuple[int, asyncio.Future[Done]]:
        """A ticket and the future of its result."""
        ticket, future = next(self._tickets), self._loop.create_future()
        self._futures[ticket] = future
        return ticket, future

    def close(self, ticket: int) -> None:
        """Forget a ticket; a late result is dropped."""
        self._futures.pop(ticket, None)

    def deliver(self, done: list[Done]) -> None:
        """Called from any thread."""
        self._loop.call_soon_threadsafe(self._resolve, done)

    def _resolve(self, done: list[Done]) -> None:
        for result in done:
            future = self._futures.pop(result.ticket, None)
            if future is not None and not future.done():
                future.set_result(result)


class RankingService:
    """Serves one model."""

    def __init__(
        self,
        *,
        schema: FeatureSchema,
        model: str,
        version: str,
        config: ServerConfig,
        store: Store,
        assembler: Assembler,
        dispatcher: Dispatcher,
        inbox: Inbox,
        metrics: Metrics,
    ) -> None:
        self._schema, self._model, self._version, self._config = schema, model, version, config
        self._store, self._assembler, self._dispatcher, self._inbox = store, assembler, dispatcher, inbox
        self._metrics = metrics
        self._validator = Validator(schema, model, version, config)
        self.draining = False
        self.in_flight = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """The service with raw-bytes methods: a malformed message reaches our code, not gRPC's parser."""
        return grpc.method_handlers_generic_handler(SERVICE, {"Rank": grpc.unary_unary_rpc_method_handler(self.rank)})

    async def rank(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Answer one call; whatever happens, it ends in one status and is counted once."""
        started = time.monotonic_ns()
        remaining = context.time_remaining()
        seconds = self._config.default_timeout_ms / 1e3 if remaining is None else min(remaining, _YEAR_SECONDS)
        deadline = started + int(seconds * 1e9)
        self._metrics.accepted()
        self.in_flight += 1
        try:
            async with asyncio.timeout(seconds):
                answer = await self._answer(message, started, deadline)
            self._metrics.finished("ok")
            return answer
        except RankError as error:
            fault = error.fault
        except TimeoutError:
            fault = Fault.DEADLINE_EXCEEDED
        except asyncio.CancelledError:
            # gRPC cancels the handler when the caller goes away and when the caller's deadline passes.
            if time.monotonic_ns() >= deadline:
                self._metrics.finished("expired", Fault.DEADLINE_EXCEEDED.name)
            else:
                self._metrics.finished("cancelled", "CANCELLED")
            raise
        except Exception:
            log.exception("a call failed")
            fault = Fault.INTERNAL
        finally:
            self.in_flight -= 1
        self._metrics.finished(_outcome(fault), fault.name)
        await context.abort(fault.status, fault.details)
        raise AssertionError("abort raises")

    async def _answer(self, message: bytes, started: int, deadline: int) -> bytes:
        if self.draining:
            raise RankError(Fault.DRAINING)
        if self.in_flight > self._config.max_in_flight:
            raise RankError(Fault.OVERLOADED)
        if deadline <= started:
            raise RankError(Fault.DEADLINE_EXCEEDED)
        request, request_id = self._validator.parse(message)
        decoded = time.monotonic_ns()
        if deadline <= decoded:
            raise RankError(Fault.DEADLINE_EXCEEDED)
        assembled = await self._features(request)
        assembled_at = time.monotonic_ns()
        done = await self._score(assembled.record, deadline)
        scored = time.monotonic_ns()
        answer = self._respond(request, request_id, assembled, done)
        encoded = time.monotonic_ns()
        stages = {
            "decode": decoded - started,
            "features": assembled_at - decoded,
            "queue": done.queue_ns,
            "assemble": done.assemble_ns,
            "compute": done.compute_ns,
            "encode": encoded - scored,
            "total": encoded - started,
        }
        for stage, nanoseconds in stages.items():
            setattr(answer.timings, f"{stage}_us", nanoseconds // 1000)
        answer.timings.batches = done.batches
        self._metrics.stages(stages)
        return answer.SerializeToString()

    async def _features(self, request: RankRequest) -> Assembled:
        try:
            wanted = request.candidates if self._schema.fetches_items else request.candidates[:0]
            fetched = await self._store.fetch(request.user, wanted)
        except StoreError:
            log.exception("the store failed")
            raise RankError(Fault.STORE_UNAVAILABLE) from None
        except CorruptRecord:
            log.exception("the store holds a damaged record")
            raise RankError(Fault.CORRUPT_RECORD) from None
        assembled = self._assembler.assemble(request, fetched)
        if self._config.strict_ids and assembled.report.unknown_user:
            raise RankError(Fault.UNKNOWN_USER)
        if self._config.strict_ids and assembled.report.unknown_items:
            raise RankError(Fault.UNKNOWN_ITEM)
        return assembled

    async def _score(self, record: np.ndarray, deadline: int) -> Done:
        ticket, future = self._inbox.open()
        try:
            self._dispatcher.submit(ticket, record, deadline)
            done = await future
        except QueueFull:
            raise RankError(Fault.OVERLOADED) from None
        except asyncio.CancelledError:
            self._dispatcher.cancel(ticket)
            raise
        finally:
            self._inbox.close(ticket)
        if done.status is Status.EXPIRED:
            raise RankError(Fault.DEADLINE_EXCEEDED)
        if done.status is Status.FAILED:
            raise RankError(Fault.INTERNAL)
        return done

    def _respond(
        self, request: RankRequest, request_id: str, assembled: Assembled, done: Done
    ) -> ranking_pb2.RankResponse:
        scores, report = done.scores, assembled.report
        assert scores is not None, "an OK result has scores"
        if not np.isfinite(scores).all():
            raise RankError(Fault.BAD_SCORES)
        answer = ranking_pb2.RankResponse(model=self._model, version=self._version, request_id=request_id)
        columns = np.ascontiguousarray(scores.T, "<f4")
        for task in request.tasks:
            answer.scores.add(task=self._schema.tasks[task], values=columns[task].tobytes())
        if request.top_k:
            first = columns[request.tasks[0]]
            best = np.argsort(-first, kind="stable")[: request.top_k]
            answer.top.task = self._schema.tasks[request.tasks[0]]
            answer.top.item_ids = request.candidates[best].astype("<i8").tobytes()
            answer.top.values = first[best].tobytes()
        flags = answer.flags
        flags.unknown_user, flags.truncated_history = report.unknown_user, report.truncated_history
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
