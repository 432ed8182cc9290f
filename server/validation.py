"""From the bytes of a message to a validated request. Ids and times are checked as 64-bit integers.

A message is parsed once, by `parse`; which version answers is known only then, and its schema checks the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from flame_jax.config import ServerConfig
from flame_jax.packing import MAX_TIME
from flame_jax.pda.records import feature_row
from flame_jax.pda.store import usable_key
from flame_jax.request import History, RankRequest
from flame_jax.schema import FeatureSchema
from flame_jax.server.errors import Fault, RankError
from flame_jax.server.proto import ranking_pb2

MAX_REQUEST_ID = 256


def parse(message: bytes) -> ranking_pb2.RankRequest:
    """The message, and of it what matters before a version is chosen: its keys. Raises RankError."""
    try:
        wire = ranking_pb2.RankRequest.FromString(message)
    except DecodeError:
        raise RankError(Fault.MALFORMED_MESSAGE) from None
    _require(usable_key(wire.user), Fault.BAD_USER)
    _require(len(wire.request_id.encode()) <= MAX_REQUEST_ID, Fault.BAD_REQUEST_ID)
    return wire


class Validator:
    """Checks messages against what one version serves."""

    def __init__(self, schema: FeatureSchema, config: ServerConfig) -> None:
        self._schema, self._config = schema, config
        self._sent = {f.name: f for f in schema.item_features if f.source == "request"}

    def request(self, wire: ranking_pb2.RankRequest) -> RankRequest:
        """The request that a parsed message makes. Raises RankError."""
        traffic_class = _index(wire.traffic_class, tuple(self._config.traffic_classes), Fault.UNKNOWN_TRAFFIC_CLASS)
        history = self._history(wire.history) if wire.HasField("history") else None
        newest = int(history.timestamps[-1]) if history is not None and len(history) else 0
        # A caller whose clock runs ahead of ours may send an event just made: the default is never before it.
        request_time = wire.request_time if wire.HasField("request_time") else max(int(time.time()), newest)
        _require(0 <= request_time <= MAX_TIME, Fault.BAD_REQUEST_TIME)
        _require(newest <= request_time, Fault.BAD_HISTORY)
        candidates = self._candidates(wire.candidate_ids)
        _require(wire.top_k <= self._config.max_candidates, Fault.BAD_TOP_K)
        return RankRequest(
            user=wire.user,
            candidates=candidates,
            scenario=_index(wire.scenario, self._schema.scenarios, Fault.UNKNOWN_SCENARIO),
            request_time=request_time,
            history=history,
            context=self._context(wire),
            item_features=self._item_features(wire.item_features, len(candidates)),
            tasks=self._tasks(wire.tasks),
            top_k=min(wire.top_k, len(candidates)),
            traffic_class=traffic_class,
        )

    def _candidates(self, raw: bytes) -> np.ndarray:
        _require(len(raw) % 8 == 0, Fault.BAD_CANDIDATE_BYTES)
        ids = np.frombuffer(raw, "<i8")
        _require(len(ids) > 0, Fault.NO_CANDIDATES)
        _require(len(ids) <= self._config.max_candidates, Fault.TOO_MANY_CANDIDATES)
        _require(int(ids.min()) >= 0, Fault.NEGATIVE_ITEM)
        return ids

    def _history(self, wire: ranking_pb2.History) -> History:
        try:
            history = History(
                np.frombuffer(wire.item_ids, "<i8"),
                np.frombuffer(wire.actions, "<i4"),
                np.frombuffer(wire.timestamps, "<i8"),
            )
            history.check(self._schema.actions)
        except ValueError:
            raise RankError(Fault.BAD_HISTORY) from None
        return history

    def _context(self, wire: ranking_pb2.RankRequest) -> dict[str, int | float]:
        # Bounded first: a message may carry a million entries, and this runs on the event loop.
        _require(len(wire.context) <= len(self._schema.context_features), Fault.BAD_CONTEXT)
        values: dict[str, int | float] = {}
        for name, value in wire.context.items():
            kind = value.WhichOneof("value")
            _require(kind is not None, Fault.BAD_CONTEXT)
            values[name] = value.integer if kind == "integer" else value.number
        try:
            feature_row(self._schema.context_features, values)
        except (ValueError, OverflowError):
            raise RankError(Fault.BAD_CONTEXT) from None
        return values

    def _item_features(self, sent: Mapping[str, bytes], count: int) -> dict[str, np.ndarray]:
        _require(len(sent) <= len(self._sent) and set(sent) <= set(self._sent), Fault.BAD_ITEM_FEATURES)
        columns = {}
        for name, raw in sent.items():
            feature = self._sent[name]
            # A numeric value may come as an integer: its 8 bytes tell it from a float32.
            floats = feature.kind == "numeric" and len(raw) == 4 * count
            wire_dtype = np.dtype("<f4" if floats else "<i8")
            _require(len(raw) == count * wire_dtype.itemsize, Fault.BAD_ITEM_FEATURES)
            values = np.frombuffer(raw, wire_dtype)
            _require(feature.fits(values), Fault.BAD_ITEM_FEATURES)
            columns[name] = values.astype(feature.stored_dtype)
        return columns

    def _tasks(self, names: Sequence[str]) -> tuple[int, ...]:
        known = self._schema.tasks
        _require(len(names) <= len(known), Fault.UNKNOWN_TASK)
        _require(len(set(names)) == len(names) and set(names) <= set(known), Fault.UNKNOWN_TASK)
        return tuple(known.index(name) for name in names or known)


def _require(condition: object, fault: Fault) -> None:
    if not condition:
        raise RankError(fault)


def _index(name: str, known: tuple[str, ...], fault: Fault) -> int:
    """Index of a name, 0 for an empty one."""
    if not name:
        return 0
    _require(name in known, fault)
    return known.index(name)
