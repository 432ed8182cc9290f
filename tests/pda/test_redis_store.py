"""The networked store under faults: late, lost, cut and wrong answers, and none at all."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import random
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.asyncio.connection import AbstractConnection

from bench.pda.servers import Proxy, Server, running
from flame_jax.feature_config import CacheConfig, StoreConfig
from flame_jax.pda.query import FeatureQuery
from flame_jax.pda.records import CorruptRecord
from flame_jax.pda.redis_store import LONGEST_PAUSE, TRIES, Gate, RedisStore, connect
from flame_jax.pda.store import StoreError
from tests.pda.stored import IDS, YEARS, ids, write_store

EVERY = ids(*sorted(IDS))
TIMEOUT_MS = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_store(tmp_path / "lmdb")
    with running(tmp_path) as found:
        found.fill(tmp_path / "lmdb")
        yield found


@asynccontextmanager
async def opened(server: Server, proxy: Proxy | None = None, **changed: object) -> AsyncIterator[RedisStore]:
    """The store, through a proxy if there is one."""
    config = StoreConfig(url=server.url, timeout_ms=TIMEOUT_MS)
    if proxy is not None:
        config = replace(config, url=f"redis://127.0.0.1:{await proxy.start()}")
    store = await RedisStore.open(replace(config, **changed))  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.aclose()
        if proxy is not None:
            await proxy.stop()


async def right(store: RedisStore) -> None:
    """Everything is answered, and with its own values."""
    fetched = await store.fetch("u", EVERY)
    assert fetched.user is not None
    assert fetched.user.history.item_ids.tolist() == [3, 2**32 + 3]
    assert fetched.items["year"].tolist() == [YEARS[item] for item in EVERY.tolist()]


async def recovered(store: RedisStore, seconds: float) -> float:
    """Seconds until the store answers again."""
    begun = time.monotonic()
    while True:
        try:
            await right(store)
            return time.monotonic() - begun
        except StoreError:
            assert time.monotonic() - begun < seconds
            await asyncio.sleep(0.01)


async def failing(call: Coroutine[object, object, object]) -> float:
    """Seconds until a call fails."""
    begun = time.monotonic()
    with pytest.raises(StoreError):
        await call
    return time.monotonic() - begun


def test_a_store_that_hangs_is_given_up_in_time_and_taken_up_again(server: Server) -> None:
    async def run() -> None:
        proxy = Proxy(server.port)
        async with opened(server, proxy) as store:
            await right(store)
            proxy.hang = True
            for _ in range(TRIES):
                assert TIMEOUT_MS / 1e3 <= await failing(store.fetch("u", EVERY)) < 3 * TIMEOUT_MS / 1e3
            at_once = [await failing(store.fetch("u", EVERY)) for _ in range(50)]
            assert sorted(at_once)[25] < 0.002, "while it is down, calls do not wait for it"
            proxy.hang = False
            await recovered(store, 2.0)
            for _ in range(20):
                await right(store)  # what came too late is nobody's answer

    asyncio.run(run())


def test_a_store_that_is_killed_comes_back(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with opened(server) as store:
            await right(store)
            server.stop()
            for _ in range(20):
                assert await failing(store.fetch("u", EVERY)) < 3 * TIMEOUT_MS / 1e3
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.fill, tmp_path / "lmdb")
            await recovered(store, 2.0)

    asyncio.run(run())
    said = [record.getMessage() for record in caplog.records if "redis_store" in record.name]
    assert len(said) == 2, "once when it goes down, once when it is back"
    assert "counts as down" in said[0]
    assert "answers again" in said[1]


def test_broken_connections_are_made_anew(server: Server) -> None:
    async def run() -> None:
        proxy, failures, chance = Proxy(server.port), 0, random.Random(1)
        async with opened(server, proxy) as store:
            proxy.reset = lambda _: chance.random() < 0.01
            for _ in range(1500):
                try:
                    await right(store)
                except StoreError:
                    failures += 1
        assert failures <= 2, "one in a thousand at most"

    asyncio.run(run())


def test_answers_in_pieces_are_put_together(server: Server) -> None:
    async def run() -> None:
        proxy = Proxy(server.port)
        proxy.slices = 7
        async with opened(server, proxy, timeout_ms=2000.0) as store:
            await right(store)

    asyncio.run(run())


def test_more_calls_than_connections_wait_no_longer_than_the_store_may(server: Server) -> None:
    async def run() -> None:
        proxy = Proxy(server.port)
        async with opened(server, proxy, connections=2) as store:
            await right(store)
            proxy.delay = 0.03
            begun = time.monotonic()
            outcomes = await asyncio.gather(*(store.fetch("u", EVERY) for _ in range(40)), return_exceptions=True)
            assert time.monotonic() - begun < 3 * TIMEOUT_MS / 1e3
            assert {type(outcome).__name__ for outcome in outcomes} == {"Fetched", "StoreError"}
            proxy.delay = 0.0
            await recovered(store, 2.0)

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["off", "sync", "async"])
def test_no_answer_reaches_another_call_when_calls_are_cancelled(server: Server, mode: str) -> None:
    client = redis.Redis.from_url(server.url)
    blob = client.get("flame:u:u")
    assert isinstance(blob, bytes)
    client.close()

    async def run() -> None:
        proxy, chance = Proxy(server.port), random.Random(2)
        async with opened(server, proxy, connections=4, timeout_ms=5000.0) as store:
            query = FeatureQuery(store, CacheConfig(mode, ttl_seconds=0.002))  # type: ignore[arg-type]

            async def call() -> bool:
                wanted = np.array(chance.choices(IDS, k=5), np.int64)
                fetched = await query.fetch("u", wanted)
                assert fetched.items["id"].tolist() == wanted.tolist()
                values = dict(zip(wanted.tolist(), fetched.items["year"].tolist(), strict=True))
                assert all(values[item] == YEARS[item] for item in values) or fetched.degraded
                assert fetched.user is None or fetched.user.history.item_ids.tolist() == [3, 2**32 + 3]
                return True

            answered = cancelled = 0
            for _ in range(60):
                proxy.delay = chance.choice([0.0, 0.002])
                calls = [asyncio.create_task(call()) for _ in range(20)]
                await asyncio.sleep(chance.random() * 0.003)
                for task in calls:
                    if chance.random() < 0.1:
                        task.cancel()
                for outcome in await asyncio.gather(*calls, return_exceptions=True):
                    assert outcome is True or isinstance(outcome, asyncio.CancelledError), outcome
                    answered += outcome is True
                    cancelled += outcome is not True
            assert answered > 800
            assert cancelled > 20
            await asyncio.gather(*query._tasks)

    asyncio.run(run())


# What a server may say


def test_a_damaged_value_is_a_corrupt_record(server: Server) -> None:
    async def run() -> None:
        async with opened(server) as store:
            for name, value in (
                (b"flame:i:" + (5).to_bytes(8, "little"), b"short"),
                (b"flame:i:" + (5).to_bytes(8, "little"), client.get(b"flame:i:" + (7).to_bytes(8, "little"))),
                (b"flame:u:u", b"x" * 100),
                (b"flame:u:u", client.get("flame:u:" + "x" * 256)),
            ):
                before = client.get(name)
                client.set(name, value)  # type: ignore[arg-type]
                with pytest.raises(CorruptRecord):
                    await store.fetch("u", EVERY)
                client.set(name, before)  # type: ignore[arg-type]
            await right(store)

    with closing(redis.Redis.from_url(server.url)) as client:
        asyncio.run(run())


def test_a_value_of_another_type_is_none(server: Server) -> None:
    async def run() -> None:
        async with opened(server) as store:
            assert (await store.fetch("list", ids(3))).user is None

    with closing(redis.Redis.from_url(server.url)) as client:
        client.lpush("flame:u:list", "a")
        asyncio.run(run())


@pytest.mark.parametrize(
    "answer",
    [
        "LOADING Redis is loading the dataset in memory",
        "OOM command not allowed when used memory > 'maxmemory'",
        "READONLY You can't write against a read only replica",
        "NOAUTH Authentication required.",
        "MOVED 866 10.0.0.1:7002",
        "ERR unknown",
    ],
)
def test_an_error_for_an_answer_is_a_store_error_in_one_line(answer: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(f"-{answer}\r\n".encode() * 4)
        writer.close()

    async def run() -> None:
        fake = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = fake.sockets[0].getsockname()[1]
        with pytest.raises(StoreError, match=f"127.0.0.1:{port}") as error:
            await RedisStore.open(StoreConfig(url=f"redis://127.0.0.1:{port}"))
        assert "\n" not in str(error.value)
        fake.close()
        await asyncio.wait_for(fake.wait_closed(), 5)

    asyncio.run(run())


def test_a_store_that_is_not_there_or_not_finished_is_one_line(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        empty = server.url
        with pytest.raises(StoreError, match="incomplete"):
            asyncio.run(RedisStore.open(StoreConfig(url=empty)))
    with pytest.raises(StoreError, match="connecting to"):
        asyncio.run(RedisStore.open(StoreConfig(url=empty)))


@pytest.mark.parametrize("url", ["redis://localhost:1", "rediss://localhost:1", "unix:///tmp/none"])
def test_questions_are_packed_by_hiredis_on_every_kind_of_connection(url: str) -> None:
    connection: Any = connect(StoreConfig(url=url)).connection_pool.make_connection()  # type: ignore[no-untyped-call]
    names = [b"flame:i:" + bytes([n]) * 8 for n in (10, 13, 32, 0)]
    expected = b"*5\r\n$4\r\nMGET\r\n" + b"".join(b"$16\r\n%b\r\n" % name for name in names)
    assert connection.pack_command("MGET", *names) == [expected]
    assert type(connection).pack_command is not AbstractConnection.pack_command
    assert (
        b"".join(connection.pack_command("CLIENT SETNAME", "x"))
        == b"*3\r\n$6\r\nCLIENT\r\n$7\r\nSETNAME\r\n$1\r\nx\r\n"
    )


def test_a_password_is_sent_and_never_said(tmp_path: Path) -> None:
    write_store(tmp_path / "lmdb")
    with running(tmp_path, "valkey", "--requirepass", "s3cret") as server:
        known = server.url.replace("//", "//:s3cret@")
        server.fill(tmp_path / "lmdb", known)
        with asyncio.Runner() as runner:
            opened = runner.run(RedisStore.open(StoreConfig(url=known)))
            assert "s3cret" not in opened.name
            runner.run(right(opened))
            runner.run(opened.aclose())
        for wrong in (server.url, server.url.replace("//", "//:wr0ng@")):
            with pytest.raises(StoreError) as error:
                asyncio.run(RedisStore.open(StoreConfig(url=wrong)))
            assert "wr0ng" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@localhost",
        ":s3cret@localhost:1",
        "s3cret",
        "redis://:s3/cret@localhost:1",
        "redis://:s3#cret@localhost:1",
        "redis://:s\u2100cret@localhost:1",
        "redis://:s3cret@[::1",
        "redis://:s3cret@localhost:99999",
        "redis://localhost:1?password=s3cret",
        "redis://localhost:1/0?decode_responses=True",
        "redis://:s3cret@localhost:1?ssl_ca_certs=/x",
        "rediss://:s3cret@localhost:1?timeout=3",
        "redis://:s3cret@localhost:1/first",
        "unix://:s3cret@",
    ],
)
def test_what_is_no_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match=r"store\.url") as error:
        asyncio.run(RedisStore.open(StoreConfig(url=url)))
    assert "cret" not in str(error.value)


def test_a_server_that_repeats_what_it_was_sent_is_not_quoted(tmp_path: Path) -> None:
    with running(tmp_path, "valkey", "--rename-command", "AUTH", "xx") as server:
        url = server.url.replace("//", "//me:s3cret@")
        with pytest.raises(StoreError, match="answers with ResponseError") as error:
            asyncio.run(RedisStore.open(StoreConfig(url=url)))
        assert "s3cret" not in str(error.value)


def test_a_store_slower_than_calls_wait_still_fills_the_cache(server: Server) -> None:
    async def run() -> None:
        proxy = Proxy(server.port)
        async with opened(server, proxy, timeout_ms=20.0) as store:
            query = FeatureQuery(store, CacheConfig("async"))
            proxy.delay = 0.04
            for _ in range(50):
                fetched = await query.fetch("u", EVERY)
                assert fetched.user_lost
                await asyncio.sleep(0.01)
            assert fetched.items["year"].tolist() == [YEARS[item] for item in EVERY.tolist()]

    asyncio.run(run())


def test_more_time_than_a_second_is_given_where_it_is_allowed(server: Server) -> None:
    async def run() -> None:
        proxy = Proxy(server.port)
        async with opened(server, proxy, timeout_ms=3000.0) as store:
            proxy.delay = 1.2
            await right(store)

    asyncio.run(run())


def test_the_gate_closes_on_failures_in_a_row_and_lets_one_in_a_while_through(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("flame_jax.pda.redis_store.time.monotonic", lambda: now)
    gate, error = Gate("store"), StoreError("late")

    def closed() -> bool:
        try:
            gate.enter()
        except StoreError:
            return True
        return False

    burst = [gate.enter() for _ in range(50)]
    now += 0.01
    gate.succeeded()
    for begun in burst:
        gate.failed(begun, error)
    assert not closed(), "one of the burst was answered"
    now += 0.01
    for _ in range(TRIES):
        assert not closed()
        gate.failed(gate.enter(), error)
    assert closed()
    let_through = []
    for _ in range(600):
        now += 0.01
        if not closed():
            let_through.append(now)
            for _ in range(20):
                gate.failed(now, error)  # others that began before, too
    waits = np.diff(let_through)
    assert 5 <= len(let_through) <= 20
    assert waits.max() <= LONGEST_PAUSE + 0.011
    assert waits[-1] >= LONGEST_PAUSE / 2
    gate.succeeded()
    assert not closed()


def certificate(folder: Path) -> tuple[str, str]:
    """Files of a self-signed certificate for 127.0.0.1 and of its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return str(files[0]), str(files[1])


def test_tls_is_spoken_with_whoever_the_certificate_names(server: Server, tmp_path: Path) -> None:
    known, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(known, key)

    async def run() -> None:
        proxy = Proxy(server.port, tls)
        url = f"rediss://127.0.0.1:{await proxy.start()}"
        store = await RedisStore.open(StoreConfig(url=f"{url}?ssl_ca_certs={known}", timeout_ms=2000.0))
        await right(store)
        await store.aclose()
        with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
            await RedisStore.open(StoreConfig(url=url))
        await proxy.stop()

    asyncio.run(run())
