from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankRequest(_message.Message):
    __slots__ = ("user", "model", "version", "scenario", "request_id", "traffic_class", "request_time", "candidate_ids", "history", "context", "tasks", "top_k", "item_features")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FeatureValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FeatureValue, _Mapping]] = ...) -> None: ...
    class ItemFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    USER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_CLASS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIME_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ITEM_FEATURES_FIELD_NUMBER: _ClassVar[int]
    user: str
    model: str
    version: str
    scenario: str
    request_id: str
    traffic_class: str
    request_time: int
    candidate_ids: bytes
    history: History
    context: _containers.MessageMap[str, FeatureValue]
    tasks: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    item_features: _containers.ScalarMap[str, bytes]
    def __init__(self, user: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., scenario: _Optional[str] = ..., request_id: _Optional[str] = ..., traffic_class: _Optional[str] = ..., request_time: _Optional[int] = ..., candidate_ids: _Optional[bytes] = ..., history: _Optional[_Union[History, _Mapping]] = ..., context: _Optional[_Mapping[str, FeatureValue]] = ..., tasks: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., item_features: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("item_ids", "actions", "timestamps")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMPS_FIELD_NUMBER: _ClassVar[int]
    item_ids: bytes
    actions: bytes
    timestamps: bytes
    def __init__(self, item_ids: _Optional[bytes] = ..., actions: _Optional[bytes] = ..., timestamps: _Optional[bytes] = ...) -> None: ...

class FeatureValue(_message.Message):
    __slots__ = ("integer", "number")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    integer: int
    number: float
    def __init__(self, integer: _Optional[int] = ..., number: _Optional[float] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("scores", "top", "model", "version", "request_id", "flags", "timings")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[TaskScores]
    top: TopK
    model: str
    version: str
    request_id: str
    flags: Flags
    timings: Timings
    def __init__(self, scores: _Optional[_Iterable[_Union[TaskScores, _Mapping]]] = ..., top: _Optional[_Union[TopK, _Mapping]] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., request_id: _Optional[str] = ..., flags: _Optional[_Union[Flags, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class TaskScores(_message.Message):
    __slots__ = ("task", "values")
    TASK_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    task: str
    values: bytes
    def __init__(self, task: _Optional[str] = ..., values: _Optional[bytes] = ...) -> None: ...

class TopK(_message.Message):
    __slots__ = ("task", "item_ids", "values")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    task: str
    item_ids: bytes
    values: bytes
    def __init__(self, task: _Optional[str] = ..., item_ids: _Optional[bytes] = ..., values: _Optional[bytes] = ...) -> None: ...

class Flags(_message.Message):
    __slots__ = ("degraded", "unknown_user", "truncated_history", "unknown_items", "missing_items")
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_USER_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_HISTORY_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MISSING_ITEMS_FIELD_NUMBER: _ClassVar[int]
    degraded: bool
    unknown_user: bool
    truncated_history: bool
    unknown_items: int
    missing_items: int
    def __init__(self, degraded: _Optional[bool] = ..., unknown_user: _Optional[bool] = ..., truncated_history: _Optional[bool] = ..., unknown_items: _Optional[int] = ..., missing_items: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_us", "features_us", "queue_us", "assemble_us", "compute_us", "encode_us", "total_us", "batches")
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    FEATURES_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    ASSEMBLE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    decode_us: int
    features_us: int
    queue_us: int
    assemble_us: int
    compute_us: int
    encode_us: int
    total_us: int
    batches: int
    def __init__(self, decode_us: _Optional[int] = ..., features_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., assemble_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., encode_us: _Optional[int] = ..., total_us: _Optional[int] = ..., batches: _Optional[int] = ...) -> None: ...
