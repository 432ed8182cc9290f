"""Root folders reach the package through links, and nothing generic is installed."""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("models", "pallas_kernels", "server")
GENERIC = (*LINKED, "configs", "bench", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked tree, so that no build folder is left in the checkout."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    folders = [*LINKED, "flame_jax", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-a", *(str(ROOT / f) for f in folders), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.parametrize("name", LINKED)
def test_package_folders_are_relative_links_to_the_root(name: str) -> None:
    link = ROOT / "flame_jax" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_no_generic_name_is_importable_from_elsewhere(tmp_path: Path) -> None:
    probe = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    run = subprocess.run(
        [sys.executable, "-P", "-c", probe, *GENERIC], cwd=tmp_path, check=True, text=True, capture_output=True
    )
    assert run.stdout.strip() == "[]"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"flame_jax"}
    for needed in (
        "flame_jax/server/app.py",
        "flame_jax/server/proto/ranking.proto",
        "flame_jax/server/proto/control.proto",
        "flame_jax/server/proto/ranking_pb2.py",
        "flame_jax/fke/devices/h100.txtpb",
        "flame_jax/models/climber.py",
        "flame_jax/pallas_kernels/sumi_attention/api.py",
        "flame_jax/py.typed",
    ):
        assert needed in names


def test_the_installed_wheel_serves_help_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import flame_jax.server.app as m; print(m.__file__)"],
        cwd=tmp_path,
        env=environment,
        check=True,
        text=True,
        capture_output=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    shown = subprocess.run(
        [sys.executable, "-m", "flame_jax.server", "--help"],
        cwd=tmp_path,
        env=environment,
        check=True,
        text=True,
        capture_output=True,
    )
    assert "--server.max_candidates" in shown.stdout


def test_data_files_are_found_as_resources() -> None:
    assert (importlib.resources.files("flame_jax.server.proto") / "ranking.proto").is_file()
