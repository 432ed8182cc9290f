"""Start, refuse to start, answer probes, keep deadlines, compile nothing, drain."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from flame_jax.client import RankingClient
from flame_jax.pda.lmdb_store import LmdbWriter
from flame_jax.request import History
from flame_jax.schema import FeatureSchema
from flame_jax.server.errors import Fault
from tests.packed import EPOCH
from tests.server.live import ITEMS, Files, Server, serving, to_end

NOW = EPOCH + 2 * 10**6
FREE = ["--server.port", "0", "--server.metrics_port", "0"]


def fails(flags: list[str], **env: str) -> str:
    """Start a server that must not start; returns its one line on stderr, the log left out."""
    run = to_end(*flags, "--server.log_level", "ERROR", **env)
    assert run.returncode not in (0, -6, -11)
    assert run.stdout == ""
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


def test_the_ready_line_tells_where_and_what(server: Server) -> None:
    assert re.fullmatch(
        r"READY grpc=127\.0\.0\.1:\d+ metrics=127\.0\.0\.1:\d+ admin=off model=tiny version=7 buckets=3\n", server.ready
    )


def test_the_resolved_configuration_is_logged_once(server: Server) -> None:
    assert server.log.read_text().count("configuration: {") == 1


@pytest.mark.parametrize("taken", ["port", "metrics_port"])
def test_a_taken_port_ends_the_start(files: Files, taken: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        flags = [*files.flags(), *FREE, f"--server.{taken}", str(port)]
        assert f"127.0.0.1:{port}" in fails(flags)


def test_a_missing_store_ends_the_start(files: Files, tmp_path: Path) -> None:
    line = fails([*files.flags(), *FREE, "--store.path", str(tmp_path / "none")])
    assert f"no store at {tmp_path / 'none'}" in line


def test_a_missing_artifact_ends_the_start(files: Files, tmp_path: Path) -> None:
    line = fails([*files.flags(), *FREE, "--export.artifact", str(tmp_path / "none")])
    assert "no artifact at" in line


def test_a_damaged_artifact_ends_the_start(files: Files, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(files.artifact, copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    assert "weights.safetensors does not match its hash" in fails(
        [*files.flags(), *FREE, "--export.artifact", str(copy)]
    )


def test_a_store_of_another_schema_ends_the_start(files: Files, tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "store", FeatureSchema(actions=9)) as writer:
        writer.finish("other")
    line = fails([*files.flags(), *FREE, "--store.path", str(tmp_path / "store")])
    assert "another feature schema" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--server.prot", "1"], "server.prot"),
        (["--server.port", "many"], "server.port"),
        (["--dispatch.executors", "0"], "dispatch.executors"),
        (["--dispatch.lanes", "0"], "dispatch.lanes"),
        (["--dispatch.lane_memory", "1"], "dispatch.lane_memory"),
        (["--config", "/nonexistent.yaml"], "nonexistent.yaml"),
    ],
)
def test_a_bad_configuration_ends_the_start(flags: list[str], named: str) -> None:
    assert named in fails(flags)


def test_devices_that_are_not_there_end_the_start(files: Files) -> None:
    line = fails([*files.flags(), *FREE, "--dispatch.devices", "2"])
    assert "dispatch.devices is 2, but JAX finds 1 on this machine" in line


def test_a_misspelt_variable_ends_the_start() -> None:
    assert "FLAME_SERVER__PROT" in fails([], FLAME_SERVER__PROT="1")


def test_health_and_reflection_answer(server: Server) -> None:
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "flame.v1.RankingService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "flame.v1.RankingService" in database.get_services()
        described = database.FindFileContainingSymbol("flame.v1.RankRequest")
        assert "candidate_ids" in [field.name for field in described.message_type[0].field]


def test_nothing_compiles_over_200_random_shapes(server: Server, client: RankingClient) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        length = int(random.integers(0, 300))
        history = History(
            random.choice(ITEMS, length), random.integers(0, 4, length).astype(np.int32), EPOCH + np.arange(length)
        )
        candidates = random.choice(ITEMS, int(random.integers(1, 600)))
        scores = client.rank("u1", candidates, request_time=NOW, history=history).scores["like"]
        assert len(scores) == len(candidates)
    assert server.metric("flame_compiles_after_ready_total") == 0


def test_a_deadline_too_short_is_kept_and_the_server_lives(server: Server, client: RankingClient) -> None:
    before = server.metric("flame_finished_total", outcome="expired")
    expired = 0.0
    for _ in range(50):
        with pytest.raises(grpc.RpcError) as caught:
            client.rank("u1", np.tile(ITEMS, 20), request_time=NOW, timeout=0.004)
        # Refused while the batch of the last one still runs.
        assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        expired = server.metric("flame_finished_total", outcome="expired") - before
        if expired:  # one that reached the handler; the transport may drop others before that
            break
    assert expired >= 1
    client.rank("u1", ITEMS, request_time=NOW, timeout=365 * 86400.0)


def test_cancelled_calls_leave_nothing_behind(server: Server, client: RankingClient) -> None:
    with grpc.insecure_channel(server.target) as channel:
        rank = channel.unary_unary("/flame.v1.RankingService/Rank")
        from flame_jax.server.proto import ranking_pb2

        message = ranking_pb2.RankRequest(user="u1", candidate_ids=np.tile(ITEMS, 15).tobytes()).SerializeToString()
        futures = [rank.future(message) for _ in range(40)]
        for number, future in enumerate(futures):
            time.sleep(0.0005 * (number % 5))
            future.cancel()
    client.rank("u1", ITEMS, request_time=NOW)
    for _ in range(200):
        if server.metric("flame_in_flight") == 0 and server.metric("flame_queued") == 0:
            break
        time.sleep(0.05)
    assert server.metric("flame_in_flight") == 0
    assert server.metric("flame_queued") == 0
    assert server.metric("flame_accepted_total") == server.metric("flame_finished_total")


def test_calls_over_the_bound_are_refused_at_once(files: Files, tmp_path: Path) -> None:
    with (
        serving(files, tmp_path / "log", "--server.max_in_flight", "2") as server,
        RankingClient(server.target) as client,
        ThreadPoolExecutor(16) as pool,
    ):

        def rank(_: int) -> grpc.StatusCode | None:
            try:
                client.rank("u1", np.tile(ITEMS, 10), request_time=NOW)
            except grpc.RpcError as error:
                assert error.details() == Fault.OVERLOADED.details
                return error.code()
            return None

        codes = set(pool.map(rank, range(64)))
        assert codes == {None, grpc.StatusCode.RESOURCE_EXHAUSTED}
        client.rank("u1", ITEMS, request_time=NOW)
        assert server.metric("flame_accepted_total") == server.metric("flame_finished_total")


def test_the_store_may_vanish_while_serving(files: Files, tmp_path: Path) -> None:
    shutil.copytree(files.store, tmp_path / "store")
    with (
        serving(files, tmp_path / "log", "--store.path", str(tmp_path / "store")) as server,
        RankingClient(server.target) as client,
    ):
        before = client.rank("u7", ITEMS, request_time=NOW)
        shutil.rmtree(tmp_path / "store")
        after = client.rank("u7", ITEMS, request_time=NOW)
        np.testing.assert_array_equal(before.scores["like"], after.scores["like"])


def test_sigterm_finishes_accepted_calls_and_refuses_new_ones(files: Files, tmp_path: Path) -> None:
    """Every call either succeeds or is told UNAVAILABLE, none hangs, and the process exits 0."""
    patient = ["--dispatch.target_wait_ms", "60000"]  # on a slow machine twelve callers may be too many
    with serving(files, tmp_path / "log", *patient) as server, RankingClient(server.target) as client:
        outcomes: list[str] = []
        told = threading.Event()

        def caller() -> None:
            while True:
                try:
                    answer = client.rank("u1", np.tile(ITEMS, 20), request_time=NOW, timeout=30)
                    assert len(answer.scores["like"]) == 20 * len(ITEMS)
                    outcomes.append("OK after" if told.is_set() else "OK")
                except grpc.RpcError as error:
                    outcomes.append(error.code().name)
                    return

        threads = [threading.Thread(target=caller) for _ in range(12)]
        for thread in threads:
            thread.start()
        while len(outcomes) < 24:
            time.sleep(0.01)
        told.set()
        assert server.stop() == 0
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert set(outcomes) <= {"OK", "OK after", "UNAVAILABLE"}
        assert outcomes.count("UNAVAILABLE") == 12
        assert "OK after" in outcomes


def test_every_thread_stays_on_the_cores_that_are_named(files: Files, tmp_path: Path) -> None:
    (core, *_) = sorted(os.sched_getaffinity(0))
    with serving(files, tmp_path / "server.log", "--server.cores", str(core)) as server:
        with RankingClient(server.target) as client:
            client.rank("u1", ITEMS[:9])
        tasks = list(Path(f"/proc/{server.process.pid}/task").iterdir())
        assert len(tasks) > 4
        for task in tasks:
            status = (task / "status").read_text()
            assert f"Cpus_allowed_list:\t{core}\n" in status
    assert f"cores {core}, as told" in (tmp_path / "server.log").read_text()


def test_cores_that_are_not_there_are_refused(files: Files) -> None:
    done = to_end(*files.flags(), "--server.cores", "100000")
    assert done.returncode == 1
    assert "server.cores 100000 names no core" in done.stderr
    assert "Traceback" not in done.stderr
