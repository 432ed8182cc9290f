"""Every way a call can end badly: a fixed code and a fixed sentence. No exception's text reaches a caller.

Commands of the admin port are read by operators: there the sentence tells the reason.
"""

from __future__ import annotations

from enum import Enum, StrEnum

import grpc

_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Fault(Enum):
    """Code -> (gRPC status, sentence)."""

    MALFORMED_MESSAGE = (_INVALID, "the message is not a flame.v1.RankRequest")
    BAD_USER = (_INVALID, "user must have 1 to 256 bytes and no control characters")
    BAD_REQUEST_ID = (_INVALID, "request_id must have at most 256 bytes")
    BAD_REQUEST_TIME = (_INVALID, "request_time must lie in [0, 2^31) seconds since the epoch")
    BAD_CANDIDATE_BYTES = (_INVALID, "candidate_ids must be int64 little-endian, 8 bytes each")
    NO_CANDIDATES = (_INVALID, "candidate_ids is empty; send at least one")
    TOO_MANY_CANDIDATES = (_INVALID, "candidate_ids has more ids than server.max_candidates allows")
    NEGATIVE_ITEM = (_INVALID, "item ids must not be negative")
    BAD_HISTORY = (
        _INVALID,
        "history columns must be int64, int32 and int64 little-endian of equal length, with item ids not negative, "
        "actions of the schema, and timestamps sorted, not before the epoch and not later than request_time",
    )
    UNKNOWN_SCENARIO = (_INVALID, "scenario is not one of the model's scenarios")
    UNKNOWN_TRAFFIC_CLASS = (_INVALID, "traffic_class is not one of server.traffic_classes")
    UNKNOWN_TASK = (_INVALID, "tasks must be distinct tasks of the model")
    BAD_CONTEXT = (_INVALID, "context has an unknown feature or a value outside its feature's range")
    BAD_ITEM_FEATURES = (
        _INVALID,
        "item_features must name item features that come with the request, each with one int64 "
        "or, if numeric, float32 value per candidate, in its feature's range",
    )
    BAD_TOP_K = (_INVALID, "top_k must not exceed server.max_candidates")
    UNKNOWN_ITEM = (_INVALID, "a candidate is not in the vocabulary and server.strict_ids is set")
    UNKNOWN_USER = (grpc.StatusCode.NOT_FOUND, "the store has no such user and server.strict_ids is set")
    UNKNOWN_MODEL = (grpc.StatusCode.NOT_FOUND, "model is not served here")
    UNKNOWN_VERSION = (grpc.StatusCode.NOT_FOUND, "version is not served here")
    DEADLINE_EXCEEDED = (grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer was ready")
    OVERLOADED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the server has no room for another request; try again later")
    DRAINING = (grpc.StatusCode.UNAVAILABLE, "the server is shutting down; try another one")
    STORE_UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "the feature store does not answer")
    CORRUPT_RECORD = (grpc.StatusCode.DATA_LOSS, "the feature store holds a damaged record for this request")
    BAD_SCORES = (grpc.StatusCode.INTERNAL, "the model gave a score that is not a number")
    INTERNAL = (grpc.StatusCode.INTERNAL, "the request could not be served")

    @property
    def status(self) -> grpc.StatusCode:
        """The gRPC status."""
        return self.value[0]

    @property
    def details(self) -> str:
        """What the caller reads: `CODE: sentence`."""
        return f"{self.name}: {self.value[1]}"


class RankError(Exception):
    """Ends a call with a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.name)
        self.fault = fault


class Refusal(StrEnum):
    """Codes of commands that were not carried out."""

    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    BAD_SHARE = "BAD_SHARE"
    UNKNOWN_VERSION = "UNKNOWN_VERSION"
    BAD_VERSION = "BAD_VERSION"
    NO_GOOD_VERSION = "NO_GOOD_VERSION"
    NO_OLDER_VERSION = "NO_OLDER_VERSION"
    NO_SPLIT = "NO_SPLIT"
    IS_ACTIVE = "IS_ACTIVE"
    UNREADABLE = "UNREADABLE"
    DRAINING = "DRAINING"
    INTERNAL = "INTERNAL"

    @property
    def status(self) -> grpc.StatusCode:
        """The gRPC status."""
        return _REFUSALS.get(self, grpc.StatusCode.FAILED_PRECONDITION)


_REFUSALS = {
    Refusal.MALFORMED_MESSAGE: _INVALID,
    Refusal.BAD_SHARE: _INVALID,
    Refusal.UNKNOWN_VERSION: grpc.StatusCode.NOT_FOUND,
    Refusal.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Refusal.INTERNAL: grpc.StatusCode.INTERNAL,
}


class CommandRefused(Exception):
    """A command was not carried out; what is served is as it was before."""

    def __init__(self, code: Refusal, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
