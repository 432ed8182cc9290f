"""Versions come and go under a live server, and no call notices."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
import safetensors.numpy
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from flame_jax import client as command_line
from flame_jax.client import RankingClient
from flame_jax.fke.artifact import Artifact
from flame_jax.fke.signing import SigningKey, write_key_pair
from flame_jax.fke.writer import sign_artifact
from flame_jax.model_control import ModelControlClient
from flame_jax.server.errors import Fault
from flame_jax.server.proto import control_pb2
from tests.packed import EPOCH
from tests.server.live import ITEMS, SCHEMA, Files, Server, command, environment, publish, serving, until
from tests.server.test_lifecycle import FREE, fails
from tests.server.test_rank import expected
from tests.tiny import forge

NOW = EPOCH + 2 * 10**6
CANDIDATES = ITEMS[3:13]
Generations = tuple[Files, Files]


class Oracle:
    """What each generation scores, in float64."""

    def __init__(self, generations: Generations) -> None:
        users = [f"u{n}" for n in range(8)]
        self.scores = [{user: expected(files, user, CANDIDATES, at=NOW) for user in users} for files in generations]

    def check(self, client: RankingClient, user: str, generation_of: dict[str, int], version: str = "") -> str:
        """Rank once; the scores must be those of the version that says it answered."""
        answer = client.rank(user, CANDIDATES, request_time=NOW, version=version, timeout=20)
        right = self.scores[generation_of[answer.version]][user]
        for column, task in enumerate(SCHEMA.tasks):
            np.testing.assert_allclose(answer.scores[task], right[:, column], rtol=0, atol=1e-5)
        return answer.version


@pytest.fixture(scope="module")
def oracle(generations: Generations) -> Oracle:
    oracle = Oracle(generations)
    for user in oracle.scores[0]:
        assert np.abs(oracle.scores[0][user] - oracle.scores[1][user]).max() > 1e-3, "the two can be told apart"
    return oracle


@contextmanager
def repository(
    generations: Generations, tmp_path: Path, versions: dict[str, int], *flags: str
) -> Iterator[tuple[Server, Path, ModelControlClient]]:
    """A server over a repository of these versions, its folder, and its admin port."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    for name, generation in versions.items():
        publish(generations[generation].artifact, folder / name)
    where = ["--server.models_dir", str(tmp_path / "models"), "--server.admin_port", "0"]
    with (
        serving(generations[0], tmp_path / "log", *where, "--server.poll_seconds", "0.1", *flags) as server,
        ModelControlClient(server.about["admin"]) as control,
    ):
        yield server, folder, control


def statuses(control: ModelControlClient) -> dict[str, str]:
    return {row["version"]: row["status"] for row in control.list()["versions"]}


def health(target: str, service: str = "") -> int:
    with grpc.insecure_channel(target) as channel:
        return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status)


@contextmanager
def refused(status: grpc.StatusCode, text: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is status
    assert text in str(caught.value.details())


def test_reloads_under_load_fail_no_call_and_every_answer_is_its_versions(
    generations: Generations, oracle: Oracle, tmp_path: Path
) -> None:
    generation_of = {"9": 0, "10": 1, "11": 0}
    with (
        repository(generations, tmp_path, {"9": 0}, "--server.rollback_seconds", "0.5") as (server, folder, control),
        RankingClient(server.target) as client,
    ):
        answered: list[str] = []
        done = threading.Event()

        def caller(number: int) -> None:
            for n in range(10**6):
                if done.is_set():
                    return
                answered.append(oracle.check(client, f"u{(n + number) % 8}", generation_of))

        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(caller, number) for number in range(4)]
            try:
                until(lambda: answered.count("9") > 50)
                publish(generations[1].artifact, folder / "10")
                until(lambda: answered.count("10") > 50)
                assert health(server.target) == health_pb2.HealthCheckResponse.SERVING
                publish(generations[0].artifact, folder / "11")
                until(lambda: answered.count("11") > 50)
                until(lambda: statuses(control) == {"11": "active", "10": "available", "9": "available"})
                control.rollback()  # nothing stands by: 10 is loaded again
                until(lambda: answered[-1] == "10")
                time.sleep(0.3)
                assert statuses(control)["11"] in ("draining", "withdrawn")
            finally:
                done.set()
            for each in callers:
                each.result()
        order = [answered[0], *(b for a, b in pairwise(answered) if a != b)]
        assert order[0] == "9"
        assert order[-1] == "10"
        assert server.metric("flame_compiles_after_ready_total") == 0
        assert server.metric("flame_accepted_total") == server.metric("flame_finished_total")
        assert server.metric("flame_finished_total", outcome="ok") == server.metric("flame_accepted_total")
        for version in generation_of:
            assert server.metric("flame_finished_total", version=version) == answered.count(version)
            assert 0 < server.metric("flame_batches_total", version=version) <= answered.count(version)
        assert server.metric("flame_model_role") == server.metric("flame_model_role", version="10", role="active") == 1
        assert server.metric("flame_model_info", version="10", memory_slots="in place", memory_scores="device") == 1
        assert server.metric("flame_reloads_total", result="ok") == 3
        assert server.metric("flame_rollbacks_total", reason="command") == 1
        assert server.metric("flame_model_load_seconds_count") == 4


def test_bad_and_incomplete_versions_are_passed_over_until_they_are_good(
    generations: Generations, oracle: Oracle, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "tiny"
    publish(generations[0].artifact, folder / "20")
    with (folder / "20" / "vocabulary.npy").open("ab") as file:
        file.write(b"more")
    (folder / "100").mkdir()
    shutil.copytree(generations[0].artifact, folder / "30")  # its manifest says another version
    (folder / "40").symlink_to(generations[0].artifact)
    publish(generations[0].artifact, folder / ".50")
    shutil.move(folder, tmp_path / "kept")
    with repository(generations, tmp_path, {"9": 0, "10": 1}) as (server, models, control):
        assert server.about["version"] == "10"
        for path in (tmp_path / "kept").iterdir():
            path.rename(models / path.name)
        until(lambda: server.metric("flame_bad_versions_total") == 2)
        time.sleep(0.5)
        assert statuses(control) == {"30": "bad", "20": "bad", "10": "active", "9": "available"}
        log = server.log.read_text()
        assert log.count("version 20 is bad: ") == log.count("version 30 is bad: ") == 1
        assert "20 is damaged: vocabulary.npy has" in log
        assert "is version '7', not '30'" in log
        assert server.metric("flame_bad_versions_total") == 2
        with RankingClient(server.target) as client:
            assert oracle.check(client, "u3", {"10": 1}) == "10"
            manifest = json.loads((models / "9" / "manifest.json").read_text()) | {"version": "100"}
            for path in (models / "9").iterdir():
                if path.name != "manifest.json":
                    shutil.copy(path, models / "100" / path.name)
            time.sleep(0.3)
            assert "100" not in statuses(control)
            (models / "100" / "partial").write_text(json.dumps(manifest))
            (models / "100" / "partial").rename(models / "100" / "manifest.json")
            until(lambda: oracle.check(client, "u3", {"10": 1, "100": 0}) == "100")


def test_a_version_of_nan_does_not_stay(generations: Generations, oracle: Oracle, tmp_path: Path) -> None:
    """Refused when it is loaded, or left after its first calls: either way without a command."""
    with (
        repository(generations, tmp_path, {"1": 0}) as (server, folder, control),
        RankingClient(server.target) as client,
    ):
        hidden = folder / ".2"
        publish(generations[0].artifact, folder / "0")
        shutil.copytree(folder / "0", hidden)
        weights = np.frombuffer((hidden / "weights.safetensors").read_bytes(), np.uint8).copy()
        weights[-4 * 64 :] = np.frombuffer(np.full(64, np.nan, "<f4").tobytes(), np.uint8)
        forge(hidden, "weights.safetensors", weights.tobytes())
        (hidden / "manifest.json").write_text(
            json.dumps(json.loads((hidden / "manifest.json").read_text()) | {"version": "2"})
        )
        hidden.rename(folder / "2")
        faults = set()

        def left() -> bool:
            try:
                oracle.check(client, "u3", {"1": 0})
            except grpc.RpcError as error:
                faults.add(error.details())
            return statuses(control)["2"] == "bad"

        until(left)
        assert faults <= {Fault.BAD_SCORES.details}
        assert oracle.check(client, "u3", {"1": 0}) == "1"
        assert server.metric("flame_bad_versions_total") == 1


def test_users_are_split_and_stay_where_they_are(generations: Generations, oracle: Oracle, tmp_path: Path) -> None:
    flags = ["--server.version", "1", "--server.canary", "2", "--server.canary_share", "0.25"]
    generation_of = {"1": 0, "2": 1}
    with (
        repository(generations, tmp_path, {"1": 0, "2": 1}, *flags) as (server, _, control),
        RankingClient(server.target) as client,
    ):
        assert server.about["version"] == "1"

        def versions(users: int) -> list[str]:
            return [client.rank(f"user {n}", [3], request_time=NOW).version for n in range(users)]

        first = versions(400)
        assert abs(first.count("2") - 100) < 40
        assert versions(400) == first
        for version in ("1", "2"):
            assert {oracle.check(client, f"u{n}", generation_of, version) for n in range(8)} == {version}
        with pytest.raises(grpc.RpcError) as unknown:
            client.rank("u1", [3], version="3")
        assert unknown.value.details() == Fault.UNKNOWN_VERSION.details
        state = control.split("2", 0.6)
        assert [(row["version"], row["share"]) for row in state["versions"]] == [("2", 0.6), ("1", 0.4)]
        assert server.metric("flame_split_share") == 0.6
        wider = versions(200)
        assert all(now == "2" for before, now in zip(first[:200], wider, strict=True) if before == "2")
        state = control.load("2")
        assert [(row["version"], row["status"]) for row in state["versions"]] == [("2", "active"), ("1", "standby")]
        assert set(versions(30)) == {"2"}
        assert client.rank("u1", [3], version="1").version == "1", "while it stands by"
        assert server.metric("flame_reloads_total") == 0
    with repository(generations, tmp_path / "again", {"1": 0, "2": 1}, *flags) as (server, *_):
        with RankingClient(server.target) as client:
            again = [client.rank(f"user {n}", [3], request_time=NOW).version for n in range(100)]
        assert again == first[:100], "also after a restart"


def test_commands_answer_with_the_state_or_one_reason(
    generations: Generations, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"1": 0, "2": 1, "3": 0}
    with repository(generations, tmp_path, versions, "--server.rollback_seconds", "0.2") as (server, folder, control):
        admin = server.about["admin"]

        def models(*arguments: str) -> str:
            command_line.main(["models", *arguments, "--admin", admin])
            return capsys.readouterr().out

        def error(*arguments: str) -> str:
            with pytest.raises(SystemExit) as ended:
                models(*arguments)
            assert ended.value.code == 1
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            return line

        (folder / "2" / "weights.safetensors").unlink()
        assert json.loads(models("list", "--json"))["pinned"] == ""
        shown = models("list").splitlines()
        assert shown[0] == "model tiny, newest good version"
        assert [line.split()[:2] for line in shown[1:]] == [["3", "active"], ["2", "available"], ["1", "available"]]
        assert "NOT_FOUND: UNKNOWN_VERSION: model tiny has no version '4'" in error("load", "4")
        assert "UNKNOWN_VERSION" in error("load", "../tiny/1")
        assert "FAILED_PRECONDITION: BAD_VERSION: artifact" in error("load", "2")
        assert "lacks weights.safetensors" in error("split", "2", "0.5")
        assert "INVALID_ARGUMENT: BAD_SHARE: share must be 0 or lie in [0.0001, 1], not 7.0" in error("split", "1", "7")
        assert "NO_SPLIT" in error("split", "1", "0")
        assert models("rollback").splitlines()[0] == "model tiny, newest good version"
        assert statuses(control) | {"3": ""} == {"1": "active", "2": "bad", "3": ""}
        assert "FAILED_PRECONDITION: NO_OLDER_VERSION" in error("rollback")
        assert models("load", "3").splitlines()[0] == "model tiny, pinned to 3"
        assert "100.00%" in models("list")
        assert models("load").splitlines()[0] == "model tiny, newest good version"
        with grpc.insecure_channel(admin) as channel:
            load = channel.unary_unary("/flame.v1.ModelControl/Load")
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE: the message is not a flame.v1.Load"):
                load(b"\xff\xff")
            with refused(grpc.StatusCode.UNIMPLEMENTED, ""):
                channel.unary_unary("/flame.v1.ModelControl/Unload")(b"")
            with refused(grpc.StatusCode.UNIMPLEMENTED, ""):
                channel.unary_unary("/flame.v1.RankingService/Rank")(b"")
            database = ProtoReflectionDescriptorDatabase(channel)
            assert "flame.v1.ModelControl" in database.get_services()
            database.FindFileContainingSymbol("flame.v1.SplitRequest")
        with grpc.insecure_channel(server.target) as channel, refused(grpc.StatusCode.UNIMPLEMENTED, ""):
            channel.unary_unary("/flame.v1.ModelControl/List")(b"")
        assert health(admin, "flame.v1.ModelControl") == health_pb2.HealthCheckResponse.SERVING
        shutil.rmtree(folder)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNREADABLE: model folder"):
            control.load()
        until(lambda: "what is loaded stays served" in server.log.read_text())
        time.sleep(0.4)
        with RankingClient(server.target) as client:
            assert oracle.check(client, "u3", {"3": 0}) == "3"
        assert server.log.read_text().count("what is loaded stays served") == 1
    assert "UNAVAILABLE" in error("list")


def slow(artifact: Path) -> None:
    """Give an artifact a golden set that takes seconds to replay."""
    golden = dict(Artifact(artifact).tensors("golden.safetensors"))
    requests = len(golden) // 2
    many = {f"{part}.{i}": golden[f"{part}.{i % requests}"] for part in ("record", "scores") for i in range(1500)}
    forge(artifact, "golden.safetensors", safetensors.numpy.save(many))


def test_loads_at_once_take_turns_and_go_on_without_their_callers(generations: Generations, tmp_path: Path) -> None:
    with repository(generations, tmp_path, {"1": 0, "2": 1, "3": 0, "4": 1}) as (server, folder, control):
        slow(folder / "2")
        with grpc.insecure_channel(server.about["admin"]) as channel, ThreadPoolExecutor(3) as pool:
            message = control_pb2.LoadRequest(version="2").SerializeToString()
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
                channel.unary_unary("/flame.v1.ModelControl/Load")(message, timeout=0.5)
            later = [pool.submit(control.load, name) for name in ("1", "3")]
            time.sleep(0.5)
            assert statuses(control)["4"] == "active", "the first one still loads"
            assert not any(each.done() for each in later)
            for each in later:
                each.result(60)
        log = server.log.read_text()
        order = [log.index(f"version {name} is loaded and warm") for name in ("2", "1", "3")]
        assert order[0] < min(order[1:]), log
        assert server.metric("flame_reloads_total", result="ok") == 3


@pytest.mark.parametrize("when", ["start", "reload"])
def test_sigterm_during_a_load_ends_the_process_at_once(generations: Generations, tmp_path: Path, when: str) -> None:
    with repository(generations, tmp_path, {"1": 0}) as (server, folder, _):
        publish(generations[0].artifact, tmp_path / "2")
        slow(tmp_path / "2")
        (tmp_path / "2").rename(folder / "2")
        if when == "reload":
            until(lambda: "loading version 2" in server.log.read_text())
            with RankingClient(server.target) as client:
                client.rank("u3", [3])
        else:
            log = tmp_path / "second"
            with log.open("w") as stderr:
                flags = [*generations[0].flags(), *FREE, "--server.models_dir", str(tmp_path / "models")]
                starting = subprocess.Popen(
                    command(*flags), stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
                )
            until(lambda: "loading version 2" in log.read_text())
            began = time.monotonic()
            starting.terminate()
            out, _ = starting.communicate(timeout=30)
            assert (out, starting.returncode) == ("", 0)
            assert time.monotonic() - began < 3
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5


def test_a_single_artifact_is_read_again_on_command(generations: Generations, oracle: Oracle, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    publish(generations[0].artifact, folder.with_name("7"))
    folder.with_name("7").rename(folder)
    flags = ["--export.artifact", str(folder), "--server.admin_port", "0"]
    with (
        serving(generations[0], tmp_path / "log", *flags) as server,
        ModelControlClient(server.about["admin"]) as control,
        RankingClient(server.target) as client,
    ):
        control.load()
        assert server.metric("flame_reloads_total") == 0, "nothing has changed"
        shutil.rmtree(folder)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "NO_GOOD_VERSION: no artifact at"):
            control.load()
        publish(generations[1].artifact, tmp_path / "8")
        (tmp_path / "8").rename(folder)
        control.load()
        assert oracle.check(client, "u3", {"8": 1}) == "8"
        assert oracle.check(client, "u3", {"7": 0}, version="7") == "7"
        control.rollback()
        assert oracle.check(client, "u3", {"7": 0}) == "7"
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "NO_OLDER_VERSION"):
            control.rollback()


def test_a_start_that_cannot_serve_names_each_version_and_why(generations: Generations, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    flags = [*generations[0].flags(), *FREE, "--server.models_dir", str(tmp_path / "models")]
    for name in ("1", "2"):
        publish(generations[0].artifact, folder / name)
    (folder / "1" / "weights.safetensors").write_bytes(b"")
    (folder / "2" / "manifest.json").write_text("{}")
    line = fails(flags)
    assert "no version of model tiny can be served: 2: artifact" in line
    assert "has format None" in line
    assert "; 1: artifact" in line
    assert "has no version '3'; it has 2, 1" in fails([*flags, "--server.version", "3"])


def test_a_taken_admin_port_ends_the_start(generations: Generations) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        line = fails([*generations[0].flags(), *FREE, "--server.admin_port", str(port)])
        assert f"admin port 127.0.0.1:{port} can't be bound" in line


def test_with_trusted_keys_only_signed_versions_are_served(
    generations: Generations, oracle: Oracle, tmp_path: Path
) -> None:
    write_key_pair(tmp_path / "key")
    write_key_pair(tmp_path / "stranger")
    trusted = json.dumps([str(tmp_path / "key.pub")])
    publish(generations[0].artifact, tmp_path / "1")
    assert "is not signed" in fails([*generations[0].flags(), *FREE, "--server.trusted_keys", trusted])
    flags = ["--server.trusted_keys", trusted]
    for name, key in (("2", "stranger"), ("3", "key")):
        publish(generations[1].artifact, tmp_path / name)
        sign_artifact(tmp_path / name, SigningKey(tmp_path / key))
    sign_artifact(tmp_path / "1", SigningKey(tmp_path / "key"))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "1").rename(tmp_path / "models" / "tiny" / "1")
    repository_flags = ["--server.models_dir", str(tmp_path / "models"), "--server.poll_seconds", "0.1"]
    with (
        serving(generations[0], tmp_path / "log", *flags, *repository_flags) as server,
        RankingClient(server.target) as client,
    ):
        assert "server.trusted_keys is empty" not in server.log.read_text()
        (tmp_path / "2").rename(tmp_path / "models" / "tiny" / "2")
        until(lambda: server.metric("flame_bad_versions_total") == 1)
        assert "not signed by the holder of a trusted key" in server.log.read_text()
        assert oracle.check(client, "u3", {"1": 0}) == "1"
        (tmp_path / "3").rename(tmp_path / "models" / "tiny" / "3")
        until(lambda: oracle.check(client, "u3", {"1": 0, "3": 1}) == "3")
        assert server.metric("flame_recompiled_buckets") == 0
        assert 0 <= server.metric("flame_golden_difference", version="3") < 1e-4


def test_without_trusted_keys_the_log_warns(server: Server) -> None:
    assert server.log.read_text().count("server.trusted_keys is empty") == 1
