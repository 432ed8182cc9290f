"""How a configuration is put together, and the one line that refuses a wrong one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flame_jax.commandline import load
from flame_jax.config import Config
from flame_jax.data.movielens import STORE_SCHEMA
from flame_jax.packing import Layout
from flame_jax.schema import Block, Feature

PROG = "flame-test"
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

Refusal = Callable[..., str]
File = Callable[[str], str]


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FLAME_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> File:
    """Write a YAML file and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run `load` on arguments that must be refused, and return the reason on stderr."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            load(argv, prog=PROG)
        assert ended.value.code == 2
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith(f"{PROG}: error: ")
        assert streams.err.endswith("\n")
        assert streams.err.count("\n") == 1, "the reason takes one line"
        return streams.err

    return run


def test_defaults_hold_when_nothing_is_said() -> None:
    assert load([], prog=PROG) == Config()


def test_the_command_line_is_read_when_no_arguments_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", "--server.port=7"])
    assert load(prog=PROG).server.port == 7


def test_the_environment_beats_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_SERVER__PORT", "1")
    server = load([], prog=PROG).server
    assert (server.port, server.metrics_port) == (1, Config().server.metrics_port)


def test_the_file_beats_the_environment(monkeypatch: pytest.MonkeyPatch, file: File) -> None:
    monkeypatch.setenv("FLAME_SERVER__PORT", "1")
    monkeypatch.setenv("FLAME_SERVER__METRICS_PORT", "11")
    server = load(["--config", file("server: {port: 2}")], prog=PROG).server
    assert (server.port, server.metrics_port) == (2, 11)


def test_traffic_classes_come_with_their_shares(monkeypatch: pytest.MonkeyPatch, file: File) -> None:
    wanted = {"gold": 3.0, "rest": 1.0}
    text = "server: {traffic_classes: {gold: 3, rest: 1.0}}"
    assert load(["--config", file(text)], prog=PROG).server.traffic_classes == wanted
    assert load(["--server.traffic_classes", "{gold: 3, rest: 1}"], prog=PROG).server.traffic_classes == wanted
    monkeypatch.setenv("FLAME_SERVER__TRAFFIC_CLASSES", '{"gold": 3, "rest": 1}')
    assert load([], prog=PROG).server.traffic_classes == wanted


@pytest.mark.parametrize("cores", ["0", "0-7,16", "auto"])
def test_a_lone_core_needs_no_quotes(file: File, cores: str) -> None:
    assert str(load(["--config", file(f"server:\n  cores: {cores}\n")], prog=PROG).server.cores) == cores


def test_flags_beat_the_file(monkeypatch: pytest.MonkeyPatch, file: File) -> None:
    monkeypatch.setenv("FLAME_SERVER__PORT", "1")
    path = file("server: {port: 2, metrics_port: 12}")
    server = load([f"--config={path}", "--server.port=3"], prog=PROG).server
    assert (server.port, server.metrics_port) == (3, 12)


def test_the_last_of_two_flags_wins() -> None:
    assert load(["--server.port=3", "--server.port", "4"], prog=PROG).server.port == 4


def test_structured_settings_come_from_the_environment_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_SCHEMA__TASKS", "[click, like]")
    config = load(["--export.buckets=[[64, 32]]", "--train.label_actions={click: [1], like: [3, 4]}"], prog=PROG)
    assert config.schema.tasks == ("click", "like")
    assert config.export.buckets == ((64, 32),)
    assert config.train.label_actions == {"click": [1], "like": [3, 4]}


def test_a_nested_schema_comes_from_the_file(file: File) -> None:
    path = file(
        """
        schema:
          tasks: [click]
          actions: 3
          blocks:
            - {name: all}
            - {name: bought, actions: [1, 2]}
          item_features:
            - {name: genres, kind: bits, size: 19}
          context_features:
            - name: distance
              kind: numeric
        layout:
          align: 16
        """
    )
    config = load(["--config", path], prog=PROG)
    assert config.schema.tasks == ("click",)
    assert config.schema.blocks == (Block("all"), Block("bought", (1, 2)))
    assert config.schema.item_features == (Feature("genres", "bits", 19, "store"),)
    assert config.schema.user_features == ()
    assert config.schema.context_features == (Feature("distance", "numeric", 0, "request"),)
    assert config.layout == Layout(align=16, max_requests=Layout().max_requests)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_loads(path: Path) -> None:
    config = load(["--config", str(path)], prog=PROG)
    assert config != Config()
    assert set(config.train.label_actions) >= set(config.schema.tasks)


def test_the_demo_reads_what_the_import_of_movielens_writes() -> None:
    (demo,) = [path for path in CONFIGS if path.name == "demo.yaml"]
    schema = load(["--config", str(demo)], prog=PROG).schema
    assert schema.store_fingerprint() == STORE_SCHEMA.store_fingerprint()


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}", "--conf {}", "--conf={}"])
def test_a_file_after_a_flag_is_refused(refusal: Refusal, file: File, spelling: str) -> None:
    path = file("server: {port: 2}")
    assert "--conf" in refusal("--server.port=1", *spelling.format(path).split())


def test_two_files_are_refused(refusal: Refusal, file: File) -> None:
    path = file("server: {port: 2}")
    assert "--config must be the first argument" in refusal("--config", path, "--config", path)


@pytest.mark.parametrize("flag", ["--server.prot=1", "--serve.port=1", "--server.po=1", "--port=1"])
def test_a_mistyped_flag_is_refused_by_its_name(refusal: Refusal, flag: str) -> None:
    assert flag.partition("=")[0] in refusal(flag)


def test_a_stray_argument_is_refused(refusal: Refusal) -> None:
    assert "serve" in refusal("serve")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("server: {prot: 1}", "prot"),
        ("serve: {port: 1}", "serve"),
        ("port: 1", "port"),
        ("schema: {task: [a]}", "task"),
        ("schema: {blocks: [{name: a, action: [0]}]}", "action"),
        ("schema: {item_features: [{name: a, kind: bits, sise: 3}]}", "sise"),
    ],
)
def test_a_mistyped_key_of_the_file_is_refused_by_its_name(refusal: Refusal, file: File, text: str, name: str) -> None:
    assert name in refusal("--config", file(text))


@pytest.mark.parametrize("name", ["FLAME_SERVER__PROT", "FLAME_SERVE__PORT", "FLAME_SERVER__PORT__X", "FLAME__PORT"])
def test_a_mistyped_variable_is_refused_by_its_name(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert f"{name} " in refusal()


def test_variables_of_other_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMEGRAPH__PORT", "1")
    monkeypatch.setenv("OTHER__PORT", "1")
    assert load([], prog=PROG) == Config()


@pytest.mark.parametrize(
    "flag",
    [
        "--server.port=http",
        "--server.port=1.5",
        "--server.port=true",
        "--server.port=",
        "--server.port=null",
        "--server.strict_ids=7",
        "--server.log_level=LOUD",
        "--server.drain_seconds=inf",
        "--train.learning_rate=nan",
        "--model.dtype=float16",
        "--schema.tasks=click",
        "--schema.blocks=[null]",
        "--export.buckets=[[1, 2, 3]]",
        "--export.buckets=[[a, b]]",
        "--train.label_actions=[3]",
    ],
)
def test_a_flag_of_the_wrong_type_is_refused_by_its_field(refusal: Refusal, flag: str) -> None:
    assert flag.partition("=")[0].removeprefix("--") in refusal(flag)


def test_a_variable_of_the_wrong_type_is_refused_by_its_field(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_SERVER__PORT", "http")
    assert "server.port" in refusal()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("server: {port: http}", "server.port"),
        ("server: {host: 1}", "server.host"),
        ("schema: {item_features: [{name: a, kind: embedding}]}", "schema.item_features"),
        ("schema: {item_features: [{kind: numeric}]}", "schema.item_features"),
        ("schema: {item_features: years}", "schema.item_features"),
        ("server: {port: null}", "server.port"),
        ("store: {path: }", "store.path"),
        ("layout: {align: null}", "layout.align"),
        ("export: {buckets: null}", "export.buckets"),
        ("schema: {blocks: null}", "schema.blocks"),
    ],
)
def test_a_value_of_the_wrong_type_in_the_file_is_refused_by_its_field(
    refusal: Refusal, file: File, text: str, name: str
) -> None:
    assert name in refusal("--config", file(text))


@pytest.mark.parametrize("section", ["server:", "server: null", "server: [1]", "server: 5", "server: quick"])
def test_a_section_that_is_no_mapping_is_refused_by_its_name(refusal: Refusal, file: File, section: str) -> None:
    assert "server" in refusal("--config", file(f"{section}\nlayout: {{align: 16}}\n"))


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--layout.align=3", "layout.align"),
        ("--layout.max_requests=0", "layout.max_requests"),
        ("--schema.actions=0", "schema.actions"),
        ("--schema.block_length=-1", "schema.block_length"),
        ("--schema.tasks=[a, a]", "schema.tasks"),
        ("--schema.tasks=[]", "schema.tasks"),
        ("--schema.blocks=[{name: late, actions: [1]}]", "late"),
        ("--schema.user_features=[{name: age, kind: bits, size: 32}]", "age"),
        ("--model.width=0", "model.width"),
        ("--dispatch.max_queue=0", "dispatch.max_queue"),
        ("--dispatch.lanes=0", "dispatch.lanes"),
        ("--dispatch.lane_memory=1", "dispatch.lane_memory"),
        ("--dispatch.hang_seconds=0", "dispatch.hang_seconds"),
        ("--dispatch.max_wait_us=-1", "dispatch.max_wait_us"),
        ("--server.traffic_classes={}", "server.traffic_classes"),
        ("--server.traffic_classes={a: 1, b: 0}", "server.traffic_classes"),
        ("--server.traffic_classes={a: 1.0e308, b: 1.0e308}", "server.traffic_classes"),
        ("--server.admin_port=-2", "server.admin_port"),
        ("--server.admin_port=65536", "server.admin_port"),
        ("--server.poll_seconds=-1", "server.poll_seconds"),
        ("--server.rollback_seconds=-1", "server.rollback_seconds"),
        ("--server.version=3", "server.models_dir"),
        ("--server.model=m", "server.models_dir"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_field(refusal: Refusal, flag: str, name: str) -> None:
    assert name in refusal(flag)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--server.canary=2"], "server.canary_share"),
        (["--server.canary_share=0.5"], "server.canary"),
        (["--server.canary=2", "--server.canary_share=1.5"], "server.canary_share"),
        (["--server.canary=2", "--server.canary_share=0.00001"], "server.canary_share"),
        (["--server.canary=2", "--server.canary_share=-0.5"], "server.canary_share"),
        (["--server.canary=2", "--server.canary_share=0.5", "--server.version=2"], "server.canary"),
    ],
)
def test_a_canary_that_makes_no_split_is_refused(refusal: Refusal, flags: list[str], name: str) -> None:
    assert name in refusal("--server.models_dir=models", *flags)


def test_a_value_out_of_range_is_refused_wherever_it_comes_from(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, file: File
) -> None:
    assert "layout.align" in refusal("--config", file("layout: {align: 3}"))
    monkeypatch.setenv("FLAME_LAYOUT__ALIGN", "3")
    assert "layout.align" in refusal()


def test_a_missing_file_is_refused_by_its_name(refusal: Refusal, tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refusal("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[1, 2]",
        "server: {port: 2",
        "a: b: c",
        "1: 2",
        "\t- x",
        "server: {port: 1}\n---\nserver: {port: 2}",
    ],
)
def test_a_file_that_holds_no_configuration_is_refused(refusal: Refusal, file: File, text: str) -> None:
    refusal("--config", file(text))


def test_bytes_that_are_no_text_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(bytes(range(256)))
    refusal("--config", str(path))
