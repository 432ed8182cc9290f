"""Artifacts for a GPU that is not here; needs the CUDA plugin (`make cross`), no GPU and no CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flame_jax.fke.artifact import Artifact, ArtifactError
from flame_jax.fke.device import target_of
from flame_jax.fke.engine import Engine
from flame_jax.fke.manifest import executable_name, portable_name
from flame_jax.fke.target import Target
from flame_jax.fke.tuning import Tuning, TuningError
from tests import tiny

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / ".cross"

needs_plugin = pytest.mark.skipif(not (PLUGIN / "jax_plugins").is_dir(), reason="`make cross` was not run")


def with_plugin(*args: str) -> subprocess.CompletedProcess[str]:
    """A Python process with the plugin, as on a machine without a GPU."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{PLUGIN}"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # JAX has set it in this process
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=ROOT)


def export(*args: str) -> subprocess.CompletedProcess[str]:
    return with_plugin("-m", "flame_jax.export", *args)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross")
    tiny.save_artifact(folder / "cpu")
    done = export("build", "--from", str(folder / "cpu"), "--device-kind", "h100", "--out", str(folder / "h100"))
    assert done.returncode == 0, done.stderr
    assert "chosen without measuring" in done.stderr
    return folder / "h100"


@needs_plugin
def test_an_artifact_is_compiled_for_a_gpu_that_is_not_here(crossed: Path) -> None:
    manifest, (before, content) = Artifact(crossed).manifest, tiny.built()
    assert manifest.target.platform == "cuda"
    assert manifest.target.compute_capability == "9.0"
    assert "H100" in manifest.target.device_kind
    assert manifest.target.plugin.startswith("jax-cuda13-pjrt ")
    assert [e.tuning for e in manifest.executables] == ["none"] * len(tiny.BUCKETS)
    assert manifest.schema == before.schema
    for bucket in tiny.BUCKETS:
        assert Artifact(crossed).read(portable_name(bucket)) == content[portable_name(bucket)]
        assert b"ELF" in Artifact(crossed).read(executable_name(bucket))  # a cubin


@needs_plugin
def test_its_programs_leave_scores_in_page_locked_memory(crossed: Path) -> None:
    code = """
import sys
from pathlib import Path
from flame_jax.fke.compile import lower_program
from flame_jax.fke.device import described_device
print(lower_program(Path(sys.argv[1]).read_bytes(), described_device("h100")).compile().as_text().split("\\n")[0])
"""
    done = with_plugin("-c", code, str(crossed / portable_name(tiny.BUCKETS[0])))
    assert done.returncode == 0, done.stderr
    layout = done.stdout.split("entry_computation_layout=")[1].split("->")[1]
    assert layout.startswith(f"f32[{tiny.BUCKETS[0].candidates},{len(tiny.SCHEMA.tasks)}]{{1,0:S(5)}}"), layout


@needs_plugin
def test_a_cpu_server_refuses_it_and_says_how_to_compile_it_here(crossed: Path) -> None:
    with pytest.raises(ArtifactError, match=r"built for platform 'cuda', this process has 'cpu'.*build --from"):
        Engine(Artifact(crossed), tiny.device())


@needs_plugin
def test_choices_that_a_tuning_file_lacks_are_told(crossed: Path, tmp_path: Path) -> None:
    Tuning(Artifact(crossed).manifest.target, "version: 3\n").save(tmp_path / "tuned.json")
    out = tmp_path / "h100"
    done = export(
        *("build", "--from", str(crossed), "--device-kind", "h100"),
        *("--tuned", str(tmp_path / "tuned.json"), "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert [e.tuning for e in Artifact(out).manifest.executables] == ["partial"] * len(tiny.BUCKETS)
    assert done.stderr.count("chosen without measuring") == 1
    assert "No cached config" not in done.stderr


H100 = Target("cuda", "NVIDIA H100 80GB HBM3", "9.0", "0.11.2", "jax-cuda13-pjrt 0.11.2")


def test_a_tuning_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    tuning = Tuning(H100, "version: 3\n")
    tuning.save(tmp_path / "t.json")
    assert Tuning.load(tmp_path / "t.json", H100) == tuning


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device_kind": "NVIDIA A100"}, "device_kind 'NVIDIA A100'"),
        ({"jaxlib": "0.10.0"}, "jaxlib '0.10.0'"),
        ({"plugin": "other"}, "plugin 'other'"),
        ({"format": 2}, "format 2"),
        ({"target": 3}, "can't be read"),
    ],
    ids=str,
)
def test_a_tuning_file_of_something_else_is_refused(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    Tuning(H100, "version: 3\n").save(path)
    data = json.loads(path.read_text())
    for name, value in changed.items():
        if name in data:
            data[name] = value
        else:
            data["target"][name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(TuningError, match=said) as caught:
        Tuning.load(path, H100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [b"", b"{}", b"[]", b"\xff", b"3", b'{"format": 1}'])
def test_a_tuning_file_of_junk_is_refused(junk: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(junk)
    with pytest.raises(TuningError, match="can't be read"):
        Tuning.load(tmp_path / "t.json", target_of(tiny.device()))
