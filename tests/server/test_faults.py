"""Bad messages end in one fixed code and sentence, and the server lives."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.client import RankingClient
from flame_jax.server.errors import Fault
from flame_jax.server.proto import ranking_pb2
from tests.packed import EPOCH
from tests.server.live import Files, Server, serving

Call = Callable[[bytes], Any]
Change = Callable[[ranking_pb2.RankRequest], object]
METHOD = "/flame.v1.RankingService/Rank"


def ids(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


def good() -> ranking_pb2.RankRequest:
    return ranking_pb2.RankRequest(user="u3", candidate_ids=ids(3, 5, 7), request_time=EPOCH + 10**7)


def history(request: ranking_pb2.RankRequest, items: bytes, actions: bytes, times: bytes) -> None:
    request.history.item_ids, request.history.actions, request.history.timestamps = items, actions, times
    request.history.SetInParent()


def i4(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    size = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.target, options=size) as channel:
        yield channel


@pytest.fixture(scope="module")
def call(channel: grpc.Channel) -> Call:
    rank: Call = channel.unary_unary(METHOD)
    return rank


def refused(call: Call, message: bytes, fault: Fault) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(message)
    assert caught.value.code() is fault.status
    assert caught.value.details() == fault.details
    call(good().SerializeToString())


def sent(request: ranking_pb2.RankRequest, name: str, values: bytes) -> None:
    request.item_features[name] = values


CASES: dict[str, tuple[Change, Fault]] = {
    "no user": (lambda r: r.ClearField("user"), Fault.BAD_USER),
    "NUL in user": (lambda r: setattr(r, "user", "a\0b"), Fault.BAD_USER),
    "user of 10 KB": (lambda r: setattr(r, "user", "x" * 10_000), Fault.BAD_USER),
    "no candidates": (lambda r: r.ClearField("candidate_ids"), Fault.NO_CANDIDATES),
    "half an id": (lambda r: setattr(r, "candidate_ids", ids(3)[:7]), Fault.BAD_CANDIDATE_BYTES),
    "4097 candidates": (lambda r: setattr(r, "candidate_ids", ids(*range(4097))), Fault.TOO_MANY_CANDIDATES),
    "100,000 candidates": (lambda r: setattr(r, "candidate_ids", bytes(800_000)), Fault.TOO_MANY_CANDIDATES),
    "1,000,000 candidates": (lambda r: setattr(r, "candidate_ids", bytes(8_000_000)), Fault.TOO_MANY_CANDIDATES),
    "negative id": (lambda r: setattr(r, "candidate_ids", ids(3, -1)), Fault.NEGATIVE_ITEM),
    "least id": (lambda r: setattr(r, "candidate_ids", ids(-(2**63))), Fault.NEGATIVE_ITEM),
    "unknown model": (lambda r: setattr(r, "model", "../../etc/passwd"), Fault.UNKNOWN_MODEL),
    "blank model": (lambda r: setattr(r, "model", " "), Fault.UNKNOWN_MODEL),
    "model of 10 KB": (lambda r: setattr(r, "model", "m" * 10_000), Fault.UNKNOWN_MODEL),
    "unknown version": (lambda r: setattr(r, "version", "8"), Fault.UNKNOWN_VERSION),
    "unknown scenario": (lambda r: setattr(r, "scenario", "nowhere"), Fault.UNKNOWN_SCENARIO),
    "unknown class": (lambda r: setattr(r, "traffic_class", "vip"), Fault.UNKNOWN_TRAFFIC_CLASS),
    "request id of 1 KB": (lambda r: setattr(r, "request_id", "r" * 1024), Fault.BAD_REQUEST_ID),
    "time before the epoch": (lambda r: setattr(r, "request_time", -1), Fault.BAD_REQUEST_TIME),
    "time past int32": (lambda r: setattr(r, "request_time", 2**31), Fault.BAD_REQUEST_TIME),
    "unknown task": (lambda r: r.tasks.append("buy"), Fault.UNKNOWN_TASK),
    "task twice": (lambda r: r.tasks.extend(["like", "like"]), Fault.UNKNOWN_TASK),
    "top_k of 2^32-1": (lambda r: setattr(r, "top_k", 2**32 - 1), Fault.BAD_TOP_K),
    "columns of unequal length": (lambda r: history(r, ids(1, 2), i4(0), ids(5, 6)), Fault.BAD_HISTORY),
    "actions not int32": (lambda r: history(r, ids(1), b"\0\0\0", ids(5)), Fault.BAD_HISTORY),
    "unknown action": (lambda r: history(r, ids(1), i4(4), ids(5)), Fault.BAD_HISTORY),
    "negative action": (lambda r: history(r, ids(1), i4(-1), ids(5)), Fault.BAD_HISTORY),
    "negative item in history": (lambda r: history(r, ids(-1), i4(0), ids(5)), Fault.BAD_HISTORY),
    "unsorted history": (lambda r: history(r, ids(1, 2), i4(0, 0), ids(6, 5)), Fault.BAD_HISTORY),
    "history before the epoch": (lambda r: history(r, ids(1), i4(0), ids(-5)), Fault.BAD_HISTORY),
    "history after the request": (lambda r: history(r, ids(1), i4(0), ids(2**31 - 1)), Fault.BAD_HISTORY),
    "time of 2^40": (lambda r: history(r, ids(1, 2), i4(0, 0), ids(2**40, 5)), Fault.BAD_HISTORY),
    "unknown context": (lambda r: setattr(r.context["moon"], "integer", 1), Fault.BAD_CONTEXT),
    "context out of range": (lambda r: setattr(r.context["hour"], "integer", 24), Fault.BAD_CONTEXT),
    "context of wrong type": (lambda r: setattr(r.context["hour"], "number", 3.0), Fault.BAD_CONTEXT),
    "NaN": (lambda r: setattr(r.context["speed"], "number", float("nan")), Fault.BAD_CONTEXT),
    "infinity": (lambda r: setattr(r.context["speed"], "number", float("inf")), Fault.BAD_CONTEXT),
    "1e300": (lambda r: setattr(r.context["speed"], "number", 1e300), Fault.BAD_CONTEXT),
    "unknown item feature": (lambda r: sent(r, "moon", bytes(24)), Fault.BAD_ITEM_FEATURES),
    "stored item feature": (lambda r: sent(r, "genre", bytes(24)), Fault.BAD_ITEM_FEATURES),
    "item feature of another length": (lambda r: sent(r, "price", bytes(8)), Fault.BAD_ITEM_FEATURES),
    "half as many ids in a numeric feature": (lambda r: sent(r, "price", ids(1, 2)), Fault.BAD_ITEM_FEATURES),
    "NaN price": (lambda r: sent(r, "price", np.array([1, 2, np.nan], "<f4").tobytes()), Fault.BAD_ITEM_FEATURES),
    "key of -2": (lambda r: sent(r, "shelf", ids(3, 4, -2)), Fault.BAD_ITEM_FEATURES),
    "context key of -2": (lambda r: setattr(r.context["campaign"], "integer", -2), Fault.BAD_CONTEXT),
    "context key as a number": (lambda r: setattr(r.context["campaign"], "number", 2.0), Fault.BAD_CONTEXT),
    "empty feature": (lambda r: r.context["speed"].SetInParent(), Fault.BAD_CONTEXT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_gets_its_fault(call: Call, name: str) -> None:
    change, fault = CASES[name]
    request = good()
    change(request)
    refused(call, request.SerializeToString(), fault)


def test_an_empty_message_lacks_its_user(call: Call) -> None:
    refused(call, b"", Fault.BAD_USER)


@pytest.mark.parametrize("message", [b"\xff" * 40, b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f", b"\x42\x07abc"])
def test_a_malformed_message_is_named_so(call: Call, message: bytes) -> None:
    refused(call, message, Fault.MALFORMED_MESSAGE)


@settings(max_examples=150)
@given(message=st.binary(max_size=200))
def test_random_bytes_never_end_in_an_internal_error(call: Call, message: bytes) -> None:
    try:
        call(message)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@settings(max_examples=100)
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_damaged_byte_never_ends_in_an_internal_error(call: Call, at: int, byte: int) -> None:
    request = good()
    history(request, ids(1, 2), i4(0, 1), ids(5, 6))
    request.context["speed"].number = 0.5
    message = bytearray(request.SerializeToString())
    message[at % len(message)] = byte
    try:
        call(bytes(message))
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_a_megabyte_of_unknown_fields_is_ignored(call: Call) -> None:
    unknown = b"\xfa\x07" + b"\x80\x80\x40" + bytes(1 << 20)  # field 127, length-delimited
    answer = ranking_pb2.RankResponse.FromString(call(good().SerializeToString() + unknown))
    assert len(answer.scores[0].values) == 12


def test_a_message_over_the_limit_is_refused_by_the_transport(call: Call) -> None:
    request = good()
    request.candidate_ids = bytes(16 << 20)
    with pytest.raises(grpc.RpcError) as caught:
        call(request.SerializeToString())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    call(good().SerializeToString())


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/flame.v1.RankingService/Rnk")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(range(256))]
)
def test_noise_on_the_port_does_no_harm(server: Server, call: Call, noise: bytes) -> None:
    host, port = server.target.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(noise)
    call(good().SerializeToString())


def test_strict_ids_refuse_the_unknown(files: Files, tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("strict") / "log"
    with serving(files, log, "--server.strict_ids", "true") as strict, RankingClient(strict.target) as client:
        client.rank("u3", [3])
        with pytest.raises(grpc.RpcError) as unknown_item:
            client.rank("u3", [3, 2**32 + 3])
        assert unknown_item.value.details() == Fault.UNKNOWN_ITEM.details
        with pytest.raises(grpc.RpcError) as unknown_user:
            client.rank("nobody", [3])
        assert unknown_user.value.code() is grpc.StatusCode.NOT_FOUND


def test_every_call_is_in_the_ledger_once(server: Server, call: Call) -> None:
    call(good().SerializeToString())
    with pytest.raises(grpc.RpcError):
        call(b"")
    assert server.metric("flame_accepted_total") == server.metric("flame_finished_total")
