from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SplitRequest(_message.Message):
    __slots__ = ("version", "share")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    version: str
    share: float
    def __init__(self, version: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class ModelState(_message.Message):
    __slots__ = ("model", "pinned", "versions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    pinned: str
    versions: _containers.RepeatedCompositeFieldContainer[VersionState]
    def __init__(self, model: _Optional[str] = ..., pinned: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[VersionState, _Mapping]]] = ...) -> None: ...

class VersionState(_message.Message):
    __slots__ = ("version", "status", "share", "in_flight", "ok", "failed", "reason")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[VersionState.Status]
        ACTIVE: _ClassVar[VersionState.Status]
        CANARY: _ClassVar[VersionState.Status]
        STANDBY: _ClassVar[VersionState.Status]
        DRAINING: _ClassVar[VersionState.Status]
        AVAILABLE: _ClassVar[VersionState.Status]
        WITHDRAWN: _ClassVar[VersionState.Status]
        BAD: _ClassVar[VersionState.Status]
    UNSPECIFIED: VersionState.Status
    ACTIVE: VersionState.Status
    CANARY: VersionState.Status
    STANDBY: VersionState.Status
    DRAINING: VersionState.Status
    AVAILABLE: VersionState.Status
    WITHDRAWN: VersionState.Status
    BAD: VersionState.Status
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: str
    status: VersionState.Status
    share: float
    in_flight: int
    ok: int
    failed: int
    reason: str
    def __init__(self, version: _Optional[str] = ..., status: _Optional[_Union[VersionState.Status, str]] = ..., share: _Optional[float] = ..., in_flight: _Optional[int] = ..., ok: _Optional[int] = ..., failed: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
